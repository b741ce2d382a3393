# HAProxy from Debian, for replicas of the server (docker/compose.replicas.yml), on the same base as the other images.
ARG BASE=python:3.11-slim-bookworm
FROM $BASE
RUN apt-get update \
 && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends haproxy \
 && rm -rf /var/lib/apt/lists/*
COPY docker/haproxy.cfg /etc/haproxy/haproxy.cfg
COPY docker/ready.py /usr/local/bin/
USER 10001:10001
EXPOSE 8000 8001
HEALTHCHECK --interval=10s --timeout=10s --start-period=1m --retries=3 CMD ["python3", "/usr/local/bin/ready.py"]
# At this signal HAProxy finishes its connections; at SIGTERM it ends at once.
STOPSIGNAL SIGUSR1
ENTRYPOINT ["haproxy", "-f", "/etc/haproxy/haproxy.cfg"]
