FROM python:3.13.5-slim-bookworm AS base

# One dependency beside the standard library.
RUN pip install --no-cache-dir aiohttp==3.14.5 \
 && install -d -m 0755 /data
COPY cockpit.py /app/cockpit.py
ENV PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1

FROM node:22.17.0-bookworm-slim AS node

# A VM: docker build --target vm --build-arg AGENT=claude .
FROM base AS vm
RUN apt-get update \
 && apt-get install -y --no-install-recommends ca-certificates curl gh git procps ripgrep \
 && rm -rf /var/lib/apt/lists/*
COPY --from=node /usr/local/bin/node /usr/local/bin/node
COPY --from=node /usr/local/lib/node_modules /usr/local/lib/node_modules
ARG AGENT=claude
ARG AGENT_VERSION=latest
RUN ln -s ../lib/node_modules/npm/bin/npm-cli.js /usr/local/bin/npm \
 && ln -s ../lib/node_modules/npm/bin/npx-cli.js /usr/local/bin/npx \
 && case "$AGENT" in \
      claude) package=@anthropic-ai/claude-code ;; \
      codex) package=@openai/codex ;; \
      gemini) package=@google/gemini-cli ;; \
      opencode) package=opencode-ai ;; \
      *) echo "AGENT must be claude, codex, gemini or opencode" >&2; exit 1 ;; \
    esac \
 && npm install --global --no-audit --no-fund "$package@$AGENT_VERSION" \
 && npm cache clean --force \
 && "$AGENT" --version \
 && groupadd --gid 10001 agent \
 && useradd --uid 10001 --gid 10001 --home-dir /data/home --no-create-home --shell /bin/bash agent
ENV LOCAL_AGENT=$AGENT
EXPOSE 3000
STOPSIGNAL SIGTERM
# It starts as root, since a volume at /data is root's: it makes the two folders of its user, drops to that
# user for good and stays as process 1 only to reap. The agent sees /data/work.
ENTRYPOINT ["python", "/app/cockpit.py", "vm", "--user", "agent", "--folder", "/data/work"]

# The gateway, which is what a build without --target makes.
FROM base AS gateway
RUN groupadd --system --gid 10001 cockpit \
 && useradd --system --uid 10001 --gid 10001 --home-dir /data --shell /usr/sbin/nologin cockpit \
 && install -d -o cockpit -g cockpit -m 0700 /data
ENV COCKPIT_ENV=production \
    ROUTES_FILE=/data/routes.json \
    HOST=0.0.0.0 \
    PORT=8080
VOLUME /data
WORKDIR /data
USER 10001:10001
EXPOSE 8080
HEALTHCHECK --interval=15s --timeout=5s --start-period=10s \
  CMD ["python", "-c", "import os, urllib.request; urllib.request.urlopen('http://127.0.0.1:' + os.environ['PORT'] + '/health', timeout=4)"]
# The exec form: SIGTERM reaches cockpit itself.
STOPSIGNAL SIGTERM
ENTRYPOINT ["python", "/app/cockpit.py"]
