# An image for every scheduler that takes one:  docker build -t escm2rec .   and with a GPU:  docker build -t escm2rec --build-arg BUILD=cuda .
# torch's CUDA build brings its own CUDA libraries; the host needs the driver and NVIDIA's container toolkit.
FROM python:3.11-slim-bookworm
ARG BUILD=cpu
RUN apt-get update && apt-get install -y --no-install-recommends make && rm -rf /var/lib/apt/lists/*
# Components start `python apps/VERB.py` and `torchrun` in the working directory.
WORKDIR /escm2rec
ENV PATH=/escm2rec/.venv/bin:$PATH
COPY . .
RUN make install BUILD=$BUILD
