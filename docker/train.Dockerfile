# The training image, from the locks in launch/requirements/. From the top of the checkout:
#   docker build -f docker/train.Dockerfile --target cpu -t unirl:0.1.0-cpu .
#   docker build -f docker/train.Dockerfile --target gpu -t unirl:0.1.0-gpu .
# A mirror of packages is named with --build-arg PIP_INDEX_URL=... (and UNIRL_TORCH_INDEX for the CPU build of torch).

FROM python:3.11.14-slim-bookworm AS base
# A compiler: vLLM, Triton and DeepSpeed build small parts on first use. wget: KubeRay's probes.
RUN apt-get update \
    && apt-get install -y --no-install-recommends build-essential libgomp1 libnuma1 wget \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 1000 ray \
    && useradd --uid 1000 --gid 1000 --create-home ray \
    && install -d -o ray -g ray /opt/unirl \
    && echo 'PATH=/opt/unirl/.venv/bin:$PATH' >/etc/profile.d/unirl.sh
ENV PATH=/opt/unirl/.venv/bin:$PATH RAY_USAGE_STATS_ENABLED=0
# By number, so that Kubernetes can tell that it is not root.
USER 1000
WORKDIR /opt/unirl
COPY --chown=ray:ray pyproject.toml README.md ./
COPY --chown=ray:ray launch/setup.sh launch/setup.sh
COPY --chown=ray:ray launch/requirements launch/requirements
COPY --chown=ray:ray unirl unirl
COPY --chown=ray:ray configs configs

FROM base AS cpu
ARG PIP_INDEX_URL
ARG UNIRL_TORCH_INDEX
RUN launch/setup.sh && rm -rf /home/ray/.cache
CMD ["unirl", "doctor"]

# CUDA comes with torch's own packages; only the driver is the host's, through the NVIDIA container toolkit.
FROM base AS gpu
ARG PIP_INDEX_URL
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
RUN launch/setup.sh --gpu && rm -rf /home/ray/.cache
CMD ["unirl", "doctor"]
