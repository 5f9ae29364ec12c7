# What cluster.yaml and rayjob.yaml run: Ray's image and the pinned dependencies. Ray's own images hold no torch.
#   docker build -t YOUR_REGISTRY/hardset:latest . && docker push YOUR_REGISTRY/hardset:latest
# The code itself comes with each job (--working-dir .), or from /opt/hardset where there is no working directory (rayjob.yaml).
FROM rayproject/ray:2.60.0-py311-gpu
COPY requirements.lock /tmp/requirements.lock
RUN pip install --no-cache-dir -r /tmp/requirements.lock
COPY pyproject.toml README.md /opt/hardset/
COPY ops /opt/hardset/ops
COPY pipelines /opt/hardset/pipelines
COPY jobs /opt/hardset/jobs
RUN pip install --no-cache-dir --no-deps /opt/hardset
# Else Ray ends and starts reading and writing processes all the time where actors hold most cores (jobs/session.py).
ENV RAY_idle_worker_killing_time_threshold_ms=60000
