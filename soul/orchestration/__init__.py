"""The only package that imports Ray. What Ray and its workers read from the environment at import is set here, before they do."""

import os

ENVIRONMENT = {
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "120",
    "RAY_ENABLE_AUTO_CONNECT": "0",  # a thread that outlives an interrupted run must not start another Ray
    "RAY_worker_maximum_startup_concurrency": "8",  # Ray warns of four times as many processes; two arms of a run need ten
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_TQDM": "0",
    "RAY_COLOR_PREFIX": "0",  # what Ray says through the driver would be coloured in a job's log too
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_WAIT_POLICY": "PASSIVE",
}
for _name, _value in ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)
