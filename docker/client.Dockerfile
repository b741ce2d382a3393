# The data owner's client with its gateway, for the classic builder and for BuildKit.
#
#   docker build --file docker/client.Dockerfile --tag pema-client .
#   docker run --rm --network host --env PEMA_API_KEY --volume pema-work:/work pema-client info
#
# docker/compose.gateway.yml runs the gateway.
#
# BASE, PIP_INDEX_URL and TORCH_BUILD: see server.Dockerfile.
ARG BASE=python:3.11-slim-bookworm

# Identical to server.Dockerfile up to the end of the stage torch, so that both images share these layers.
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
COPY --from=pins /build/constraints.txt /build/client.txt ./
RUN pip --python /opt/pema/bin/python install -c constraints.txt -r client.txt
COPY --from=code /opt/pema /opt/pema

# Texts, memories and adapters. A new volume that is mounted here gets the owner of the folder.
RUN install --directory --owner pema --group pema --mode 700 /work
WORKDIR /work
USER pema
ENV PATH=/opt/pema/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    XDG_CACHE_HOME=/work/.cache \
    MPLCONFIGDIR=/tmp/matplotlib
ENTRYPOINT ["pema-client"]
CMD ["--help"]
