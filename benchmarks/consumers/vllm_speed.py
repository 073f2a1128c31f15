# SPDX-License-Identifier: Apache-2.0
"""Runs in vLLM's own environment: a model that waits for its turn; imports nothing of calib.

`python vllm_speed.py FOLDER DTYPE ROWS TOKENS NEW`: loads a checkpoint, prints ``ready``, and for each line on standard
input reads ROWS prompts of TOKENS random tokens, writes NEW tokens for each and prints how long that took, in seconds.
"""

from __future__ import annotations

import json
import random
import sys
import time


def main() -> None:
    folder, dtype = sys.argv[1:3]
    rows, tokens, new = map(int, sys.argv[3:6])
    from vllm import LLM, SamplingParams
    from vllm_run import take_static_kernel

    take_static_kernel()
    engine = LLM(
        model=folder, dtype=dtype, enforce_eager=True, max_model_len=512, max_num_seqs=rows, enable_prefix_caching=False
    )
    greedy = SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True)
    chosen = random.Random(0)
    print(json.dumps("ready"), flush=True)
    for _ in sys.stdin:
        inputs = [{"prompt_token_ids": [chosen.randrange(1000, 20000) for _ in range(tokens)]} for _ in range(rows)]
        begin = time.perf_counter()
        engine.generate(inputs, greedy, use_tqdm=False)
        print(json.dumps(time.perf_counter() - begin), flush=True)


if __name__ == "__main__":
    main()
