# Slipstream for training on NVIDIA GPUs: everything comes from pip, nothing is compiled here.
#   docker build -t slipstream .
#   docker run --gpus all --ipc host -v "$PWD:/work" slipstream slipstream doctor
# torch's wheels bring CUDA, cuDNN and NCCL; the host brings the driver.
FROM python:3.12-slim

# Triton starts its kernels through a small C module that it compiles on first use.
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*

ARG TORCH=2.11.0
RUN pip install --no-cache-dir "torch==${TORCH}"
COPY pyproject.toml README.md LICENSE /src/
COPY slipstream /src/slipstream
RUN pip install --no-cache-dir "/src[train]"

WORKDIR /work
ENV TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
CMD ["slipstream", "doctor"]
