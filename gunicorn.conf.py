"""How gunicorn serves the application, where that differs from gunicorn's defaults."""

# A wrong configuration ends the start once, instead of one worker after the other.
# Nothing connects to the database until a worker, forked by then, is asked.
preload_app = True

# A sync worker is held whole by each client that sends or reads slowly; of these
# threads only those that such clients hold are lost to the others. More than bear
# twenty cost rate, since all take turns at one interpreter lock; gevent bears more of
# them, but there each client waits for the longest query of another.
worker_class = "gthread"
threads = 24

# Whoever sits on the machine may send any header: TRUSTED_PROXIES alone decides.
secure_scheme_headers = {}
forwarder_headers = ""

# No second way into the process.
control_socket_disable = True
