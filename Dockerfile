# The server alone; the model is mounted at /srv/.models (docs/serving.md).
FROM python:3.13-slim

RUN useradd --create-home --uid 1000 dlplora \
    && install --directory --owner dlplora /srv/logs
WORKDIR /opt/dlplora
COPY pyproject.toml constraints.txt README.md ./
COPY dlplora dlplora
RUN pip install --no-cache-dir --constraint constraints.txt .

USER 1000
WORKDIR /srv
EXPOSE 8000
HEALTHCHECK --interval=30s --start-period=60s CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health')"]
ENTRYPOINT ["dlplora", "serve", "--host", "0.0.0.0"]
