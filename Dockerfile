# docker build --build-arg CUDA=12 -t olmoearth-jax .     (or CUDA=13, or CUDA=none for a CPU)
# mkdir -p local_output && docker run --gpus all --shm-size=16g --user "$(id -u):$(id -g)" -e HOME=/tmp \
#     -v /data:/data:ro -v "$PWD/local_output:/app/local_output" olmoearth-jax \
#     python -m launch.train --config=configs/base.py --run_name=my_run \
#     --config.dataset.h5py_dir=/data/h5/num_samples
ARG PYTHON=3.12
FROM python:${PYTHON}-slim

ARG CUDA=12
ARG UID=1000

RUN useradd --create-home --uid "${UID}" app && mkdir -p /app/local_output && chown -R app /app
WORKDIR /app

# The dependencies first, in a layer of their own: an edit of the code does not fetch gigabytes again.
# The jax wheels bring the CUDA libraries; the host only needs a driver.
COPY requirements.lock ./
RUN case "${CUDA}" in \
      12|13) jax="jax[cuda${CUDA}]" ;; \
      none) jax="jax" ;; \
      *) echo "CUDA must be 12, 13 or none, got ${CUDA}" >&2; exit 1 ;; \
    esac \
    && pip install --no-cache-dir -r requirements.lock "${jax}" -c requirements.lock

COPY pyproject.toml README.md LICENSE NOTICE ./
COPY olmoearth_jax ./olmoearth_jax
COPY configs ./configs
COPY launch ./launch
COPY tools ./tools
RUN pip install --no-cache-dir --no-deps -e .

USER ${UID}
ENV PYTHONUNBUFFERED=1
CMD ["python", "-m", "launch.dry_run", "--config=configs/base.py"]
