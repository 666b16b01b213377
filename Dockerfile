# The command and its demo on a CPU. docs/docker.md has the commands to use it.
#
#   docker build --tag megatron-chameleon .
#
# The index's torch for x86 brings CUDA along, several gigabytes; --build-arg TORCH_INDEX=URL takes
# the CPU build from an index of PyTorch's own, whose URL is on pytorch.org under "Get started".
FROM python:3.11-slim AS build
WORKDIR /source
COPY setup.py pyproject.toml README.md LICENSE ./
COPY megatron_chameleon megatron_chameleon
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.11-slim
ARG TORCH_INDEX=
COPY constraints.txt /opt/chameleon/
RUN pip install --no-cache-dir --constraint /opt/chameleon/constraints.txt \
    ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch
COPY --from=build /wheels /opt/chameleon/wheels
RUN pip install --no-cache-dir --constraint /opt/chameleon/constraints.txt \
    "$(echo /opt/chameleon/wheels/*.whl)[serve,demo]"
COPY examples /opt/chameleon/examples

# Any user may run it: compose takes the owner of the runs folder. torch asks for the user's name
# and for a place for its caches, which a number without an account does not have.
RUN useradd --create-home --uid 1000 chameleon && mkdir /work \
    && chmod 777 /home/chameleon /work
ENV HOME=/home/chameleon USER=chameleon LOGNAME=chameleon
USER chameleon
WORKDIR /work
ENTRYPOINT ["chameleon"]
CMD ["--help"]
