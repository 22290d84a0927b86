# The trainer and its SGLang servers for GPUs in one image: docker build -t rlef-mega .
# Never built: it runs the two commands of docs/install.md on a CUDA base image, with Ubuntu's Python 3.12.
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        ca-certificates g++ git make python3.12-dev python3.12-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/rlef-mega
COPY . .
RUN export PIP_NO_CACHE_DIR=1 \
    && make setup-gpu PYTHON=python3.12 WHEELS=/opt/wheels \
    && make setup-sglang-gpu PYTHON=python3.12 WHEELS=/opt/wheels \
    && rm -r /opt/wheels*
ENV PATH=/opt/rlef-mega/.venv-gpu/bin:$PATH
