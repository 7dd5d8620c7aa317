FROM python:3.13.5-slim-bookworm

# One dependency beside the standard library.
RUN pip install --no-cache-dir aiohttp==3.14.5 \
 && groupadd --system --gid 10001 cockpit \
 && useradd --system --uid 10001 --gid 10001 --home-dir /data --shell /usr/sbin/nologin cockpit \
 && install -d -o cockpit -g cockpit -m 0700 /data
COPY cockpit.py /app/cockpit.py
ENV COCKPIT_ENV=production \
    ROUTES_FILE=/data/routes.json \
    HOST=0.0.0.0 \
    PORT=8080 \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1
VOLUME /data
WORKDIR /data
USER 10001:10001
EXPOSE 8080
HEALTHCHECK --interval=15s --timeout=5s --start-period=10s \
  CMD ["python", "-c", "import os, urllib.request; urllib.request.urlopen('http://127.0.0.1:' + os.environ['PORT'] + '/health', timeout=4)"]
# The exec form: SIGTERM reaches cockpit itself.
STOPSIGNAL SIGTERM
ENTRYPOINT ["python", "/app/cockpit.py"]
