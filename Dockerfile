# Fine-tunes from a recipe: docker run --gpus all -v "$PWD:/work" IMAGE recipes/x.yaml [key.path=value ...]
ARG PYTHON=3.12
FROM python:${PYTHON}-slim

# Set to https://download.pytorch.org/whl/cpu for a small image without CUDA.
ARG TORCH_INDEX=

RUN useradd --create-home --uid 1000 finetune && mkdir /work && chown finetune /work
COPY pyproject.toml constraints.txt README.md LICENSE /src/
COPY hf_finetune /src/hf_finetune
RUN pip install --no-cache-dir ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} -c /src/constraints.txt /src

USER finetune
WORKDIR /work
ENV PYTHONUNBUFFERED=1 HF_HOME=/home/finetune/.cache/huggingface
ENTRYPOINT ["accelerate", "launch", "-m", "hf_finetune"]
