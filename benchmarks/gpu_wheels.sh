#!/usr/bin/env bash
# Collect what a GPU machine without network lacks, into benchmarks/wheels (git ignores it): bash benchmarks/gpu_wheels.sh
#
# For a machine with Python 3.12, torch 2.11 and transformers 5.17 and their usual companions (numpy, pyarrow, pandas,
# accelerate, tensorboard, pytest, hypothesis, rich). Copy the repository there with this folder, and run
# python -m benchmarks.gpu_day, which installs the wheels into a folder of its own. Both versions of TRL are peers to
# compare with; the scripts do not need them.
set -euo pipefail
cd "$(dirname "$0")/.."
wheels=benchmarks/wheels
mkdir -p $wheels/trl_1.12 $wheels/trl_1.16
fetch() {  # folder, then packages
    python3 -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
        --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 -d "$@"
}
pinned() {  # as in requirements.txt
    grep -oE "^$1==[^ ]+" requirements.txt
}
fetch $wheels "$(pinned datasets)" "$(pinned tyro)" "$(pinned vaderSentiment)" \
    dill==0.4.1 multiprocess==0.70.19 httpx2==2.16.2 httpcore2==2.16.2 truststore==0.10.5 tzdata \
    docstring-parser==0.18.0 typeguard==4.6.1 nltk==3.10.4 defusedxml==0.7.1 \
    hjson==3.1.0 pydantic==2.14.4 pydantic-core==2.50.5 annotated-types==0.8.0 typing-inspection==0.4.5
fetch $wheels/trl_1.12 trl==1.12.0
fetch $wheels/trl_1.16 trl==1.16.0
# These two come as source. DeepSpeed without its compiled operators is plain Python.
DS_BUILD_OPS=0 python3 -m pip wheel -q --no-deps -w $wheels "$(pinned rouge-score)" "$(pinned deepspeed)"
echo "$(du -sm $wheels | cut -f1) MiB of wheels; with the repository's files $(
    (git ls-files -z; find $wheels -type f -print0) | du -cm --files0-from=- | tail -1 | cut -f1) MiB"
