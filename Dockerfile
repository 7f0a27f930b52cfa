# FlowTurbo in a container: docs/installing.md has the commands for CPUs and for NVIDIA GPUs.
ARG BASE=ubuntu:24.04
FROM ${BASE}

# What pip is told besides, such as an index of PyTorch builds for CPUs alone, which are smaller.
ARG TORCH_FLAGS=
ENV DEBIAN_FRONTEND=noninteractive \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PYTHONUNBUFFERED=1 \
    FLOWTURBO_CACHE=/cache

# A C++ compiler is what --compile needs on a CPU, and Triton on a GPU.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-dev python3-venv g++ ffmpeg \
    && rm -rf /var/lib/apt/lists/*

RUN python3 -m venv /venv
ENV PATH=/venv/bin:$PATH
# First what changes seldom: a change of the code installs no PyTorch again.
RUN pip install ${TORCH_FLAGS} "torch>=2.11" torchvision

WORKDIR /flowturbo
COPY pyproject.toml README.md LICENSE.txt ./
COPY flowturbo ./flowturbo
RUN pip install ".[demo,plot,t2i,web]"
COPY *.py ./
COPY transport ./transport
COPY benchmarks ./benchmarks
COPY recipes ./recipes
COPY examples ./examples

# ubuntu:24.04 and its relatives have a user 1000.
RUN mkdir --parents /cache /data /out && chown 1000:1000 /cache /data /out /flowturbo
USER 1000:1000
ENV HOME=/cache
VOLUME ["/cache", "/data", "/out"]
EXPOSE 7860
CMD ["python", "web.py", "--host", "0.0.0.0", "--port", "7860"]
