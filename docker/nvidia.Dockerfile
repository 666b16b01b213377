# The command on NVIDIA GPUs, on top of NVIDIA's image of PyTorch. docs/docker.md has the commands.
#
#   docker build --file docker/nvidia.Dockerfile --tag megatron-chameleon:nvidia .
#
# The image brings builds of torch, Transformer Engine, flash-attn and numpy that fit each other and
# the GPUs. They stay: keep_installed.py pins them, and ends the build if pip changed one all the
# same. So constraints.txt, which pins other builds, is not used here. setup.py needs torch 2.11 or
# newer; the image's release notes say which one it has.
ARG BASE=nvcr.io/nvidia/pytorch:26.08-py3
FROM ${BASE}
COPY docker/keep_installed.py /opt/chameleon/
RUN python /opt/chameleon/keep_installed.py > /opt/chameleon/kept.txt
WORKDIR /opt/chameleon/source
COPY setup.py pyproject.toml README.md LICENSE ./
COPY megatron_chameleon megatron_chameleon
RUN pip install --no-cache-dir --constraint /opt/chameleon/kept.txt ".[serve,demo]" \
    && python /opt/chameleon/keep_installed.py --compare /opt/chameleon/kept.txt
COPY examples /opt/chameleon/examples

# As in the other Dockerfile; the base may have an account with the number 1000 already.
RUN useradd --create-home chameleon && mkdir /work && chmod 777 /home/chameleon /work
ENV HOME=/home/chameleon USER=chameleon LOGNAME=chameleon
USER chameleon
WORKDIR /work
ENTRYPOINT ["chameleon"]
CMD ["--help"]
