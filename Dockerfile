FROM python:3.13-slim
WORKDIR /srv/jobs
COPY requirements.txt ./
RUN pip install --no-cache-dir -r requirements.txt
COPY *.py *.json ./
RUN useradd --uid 1000 jobs && install --directory --owner jobs instance
# Kubernetes (runAsNonRoot) can verify that the user is not root only if it is a number.
USER 1000
VOLUME /srv/jobs/instance
EXPOSE 8000
CMD ["gunicorn", "--bind", "0.0.0.0:8000", "wsgi:app"]
