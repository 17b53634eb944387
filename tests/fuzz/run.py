"""Runs seeded cases in several processes: `python tests/fuzz/run.py --cases 1000`, or `make test-fuzz`.

Case number n of a seed is always the same one; `--only n` repeats it. A process that does not answer in time is ended, which
counts as a failure of its case, and another one goes on behind it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
KINDS = ("folder", "folder", "folder", "call", "call", "file")  # of case n: number n modulo their count
LIMIT = 60.0  # seconds of waiting for one case, on machines that do other things besides
START = 180.0  # and for the first one, before which everything is imported and the sound folders are made
MEMORY = 4 << 30  # bytes of address space that cases may take beyond what the process has when it starts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1000, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), metavar="N")
    parser.add_argument("--only", type=int, metavar="N", help="this case alone, in this process, with its error in full")
    parser.add_argument("--kind", choices=sorted(set(KINDS)), help="cases of this kind alone")
    parser.add_argument("--work", metavar="NUMBERS", help=argparse.SUPPRESS)  # the cases of a process, as JSON
    options = parser.parse_args()
    numbers = [n for n in range(options.cases) if options.kind in (None, KINDS[n % len(KINDS)])]
    if options.only is not None:
        return work([options.only], options.seed, in_full=True)
    if options.work is not None:
        return work(json.loads(options.work), options.seed)
    start, failures, done = time.monotonic(), [], [0]
    threads = [
        threading.Thread(target=watch, args=(numbers[i :: options.workers], options.seed, failures, done))
        for i in range(options.workers)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, text in sorted(failures):
        print(f"case {number}: {text}")
    seconds = time.monotonic() - start
    print(f"{done[0]} cases of seed {options.seed} in {seconds:.0f} s: {len(failures)} failed")
    if failures:
        print(f"repeat one: python tests/fuzz/run.py --seed {options.seed} --only {sorted(failures)[0][0]}")
    return 1 if failures or done[0] != len(numbers) else 0


def watch(numbers: list[int], seed: int, failures: list[tuple[int, str]], done: list[int]) -> None:
    """Has other processes do the cases, each from where the one before it ended."""
    while numbers:
        command = [sys.executable, __file__, "--seed", str(seed), "--work", json.dumps(numbers)]
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert process.stdout is not None
        current, limit = numbers[0], START
        while True:
            timer = threading.Timer(limit, process.kill)
            timer.start()
            line = process.stdout.readline()
            timer.cancel()
            if not line:
                break
            answer = json.loads(line)
            current, limit = answer["number"], LIMIT
            if "text" not in answer:  # it begins
                continue
            done[0] += 1
            if answer["failed"]:
                failures.append((current, answer["text"]))
            numbers = numbers[numbers.index(current) + 1 :]
        if process.wait() == 0:
            return
        failures.append((current, f"the process ended with code {process.returncode}: no answer in {limit:.0f} s, or a crash"))
        done[0] += 1
        numbers = numbers[numbers.index(current) + 1 :] if current in numbers else numbers[1:]


def work(numbers: list[int], seed: int, in_full: bool = False) -> int:
    """Does cases in this process and prints a line of JSON before and after each."""
    sys.path[:0] = [str(HERE), *(str(HERE.parent / name) for name in ("..", ".", "quantization", "convert"))]
    import call_cases
    import file_cases
    import folder_cases
    import torch
    from diffusers.utils import logging
    from judging import Failure

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    runs = {"folder": folder_cases.run_case, "call": call_cases.run_case, "file": file_cases.run_case}
    print_line, failed = sys.stdout.write, 0
    with tempfile.TemporaryDirectory() as place:
        os.chdir(place)
        folder_cases.templates(Path(place))
        if sys.platform == "linux":
            import resource  # which Windows lacks

            taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, resource.RLIM_INFINITY))
        for number in numbers:
            kind = KINDS[number % len(KINDS)]
            print_line(json.dumps({"number": number}) + "\n")
            sys.stdout.flush()
            try:
                text, wrong = runs[kind](random.Random(f"{seed} {number}"), Path(place)), False
            except Failure as failure:
                if in_full:
                    raise
                text, wrong = f"{kind}, {failure}", True
            failed += wrong
            print_line(json.dumps({"number": number, "failed": wrong, "text": text}) + "\n")
            sys.stdout.flush()
        os.chdir(HERE)
    return 0 if not failed or not in_full else 1


if __name__ == "__main__":
    sys.exit(main())
