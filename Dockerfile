# Fine-tunes from a recipe, with as many processes as there are GPUs. docs/jobs.md says how to build and run it.
#
#   docker build -t hf_finetune .                                  for NVIDIA GPUs: torch's wheels bring CUDA
#   docker build -t hf_finetune:cpu --build-arg VARIANT=cpu .      small
#   docker run --gpus all -v "$PWD:/work" hf_finetune recipes/sst2_lora.yaml

# The digest is that of tag 3.11.16-slim-bookworm for all architectures; ten public files that were looked at
# name the same one for it (September and October 2026). Python and Debian are the ones that the tests run on.
ARG BASE=python:3.11.16-slim-bookworm@sha256:a36c24f9cbdf4fd0f52d67f0823eeac19c2028c637cecc392d97f980d4fec56b

# ---- everything that is installed, in one folder -----------------------------------------------------------------------
FROM ${BASE} AS build
# cuda or cpu: requirements/VARIANT.txt.
ARG VARIANT=cuda
# Where torch's CPU builds are; looked at by VARIANT=cpu only.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ONLY_BINARY=:all:
WORKDIR /src
COPY requirements/build.txt requirements/cpu.txt requirements/cuda.txt requirements/
# The secret `pip` may hold a pip.conf for a package index of your own; it stays out of the image.
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    python -m venv /opt/hf_finetune \
    && index= && if [ "$VARIANT" = cpu ]; then index="$TORCH_INDEX"; fi \
    && /opt/hf_finetune/bin/pip install --require-hashes ${index:+--extra-index-url "$index"} \
        -r "requirements/$VARIANT.txt" \
    && python -m venv /build \
    && /build/bin/pip install --require-hashes -r requirements/build.txt
COPY pyproject.toml README.md LICENSE ./
COPY hf_finetune hf_finetune
COPY recipes recipes
# Without pip in the end: what runs can't install.
RUN /build/bin/hatchling build -t wheel -d /dist \
    && /opt/hf_finetune/bin/pip install --no-deps --no-index /dist/*.whl \
    && /opt/hf_finetune/bin/pip check \
    && /opt/hf_finetune/bin/pip uninstall --yes --quiet pip

# ---- what runs -----------------------------------------------------------------------------------------------------------
FROM ${BASE}
# Any user may run it, in group 0, as OpenShift chooses: what is to be written is open to that group. Nothing is set-uid.
RUN apt-get update \
    && apt-get install -y --no-install-recommends 'tini=0.19.*' \
    && rm -rf /var/lib/apt/lists/* /var/log/apt /var/log/dpkg.log /var/cache/ldconfig/aux-cache \
    && mkdir -p /work /cache \
    && chmod 0775 /work /cache \
    && find / -xdev -type f -perm /6000 -exec chmod a-s {} +
COPY --from=build /opt/hf_finetune /opt/hf_finetune
COPY recipes /work/recipes

# Whatever a library wants to write lies in /cache, or in /tmp, which has to be writable too.
ENV PATH=/opt/hf_finetune/bin:/usr/local/bin:/usr/bin:/bin \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/tmp \
    LOGNAME=finetune \
    HF_HOME=/cache/huggingface \
    HF_FINETUNE_CACHE=/cache/hf_finetune \
    HF_FINETUNE_RUN_FILE=/tmp/hf_finetune.run \
    XDG_CACHE_HOME=/cache \
    MPLCONFIGDIR=/cache/matplotlib \
    TORCHINDUCTOR_CACHE_DIR=/cache/torchinductor \
    TRITON_CACHE_DIR=/cache/triton \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

USER 1000:0
WORKDIR /work
VOLUME ["/cache"]
HEALTHCHECK --interval=30s --timeout=10s --start-period=2m --retries=3 CMD ["python", "-m", "hf_finetune.launch.health"]
# tini reaps what is left behind, and gives a signal its default meaning, which process 1 does not have.
ENTRYPOINT ["tini", "--", "python", "-m", "hf_finetune.launch"]
CMD ["--help"]

# Last, for they change with every build.
ARG VERSION=0.1.0
ARG REVISION=unknown
ARG CREATED=unknown
LABEL org.opencontainers.image.title="hf_finetune" \
      org.opencontainers.image.description="Fine-tunes Hugging Face classifiers and LLMs from one YAML recipe" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}"
