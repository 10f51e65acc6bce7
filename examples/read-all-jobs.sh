#!/bin/sh
# Print the names of all jobs, one a line: TOKEN=... read-all-jobs.sh [URL]
#
# Each response is consistent in itself, but if jobs are deleted between two requests, later jobs move to earlier pages and
# are missed. So this compares the number of jobs that it has read with total_entries, and starts again if they differ. (It
# does not notice if as many jobs were added as were deleted.) If a request fails, it exits with curl's message and code.
set -eu
: "${TOKEN:?set TOKEN to a token of the service}"
first=${1:-http://127.0.0.1:8000/api/jobs?page_size=100}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
total=-1 count=0
while [ "$count" != "$total" ]; do
    url=$first total=
    : > jobs.jsonl
    while [ "$url" != null ]; do
        curl -fsS -H "Authorization: Bearer $TOKEN" "$url" > page.json
        jq -c '.data[]' page.json >> jobs.jsonl
        total=${total:-$(jq '.meta.total_entries' page.json)}
        url=$(jq -r '.links.next' page.json)
    done
    count=$(jq -s length jobs.jsonl)
done
jq -r '.attributes.name' jobs.jsonl
