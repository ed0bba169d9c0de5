# Stillhouse with everything that constraints.txt pins, for all nodes of a cluster:
#   docker build -t REGISTRY/stillhouse:0.1.0 . && docker push REGISTRY/stillhouse:0.1.0
# For nodes without GPUs: --build-arg TORCH_INDEX=URL, an index that has torch's CPU builds.
ARG RAY_VERSION=2.60.0
FROM rayproject/ray:${RAY_VERSION}-py311

SHELL ["/bin/bash", "-o", "pipefail", "-c"]
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 RAY_USAGE_STATS_ENABLED=0
ARG TORCH_INDEX=""

# What changes seldom comes first: the pinned libraries are a layer of their own.
WORKDIR /home/ray/stillhouse
COPY --chown=ray:users constraints.txt ./
RUN grep '^torch==' constraints.txt > torch.txt \
    && python -m pip install ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} -r torch.txt

COPY --chown=ray:users pyproject.toml README.md LICENSE ./
COPY --chown=ray:users stillhouse stillhouse
COPY --chown=ray:users actors actors
COPY --chown=ray:users pipelines pipelines
COPY --chown=ray:users jobs jobs
RUN python -m pip install -c constraints.txt '.[ray,train,s3]' \
    && python -c "import stillhouse.jobs.cli; print(stillhouse.__version__)"
WORKDIR /home/ray
