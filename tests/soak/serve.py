"""`vlm-fix serve` with clients that stream at once and are killed at random: no other's answer is lost or changed."""

from __future__ import annotations

import json
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from tests.serving.support import HuggingFace, cases
from tests.serving.test_server import Server, body
from vlm_fix.eval.files import write_atomic

METHOD = "pai:alpha=1"
WISHES = ((None, [METHOD]), ("off", []), ({"alpha": 0.3}, ["pai:alpha=0.3"]))  # of a request, and the stack it names
PROMPTS = 12
GROWTH = 0.02
CLIENT = """
import json, random, signal, sys, urllib.request
url, plan, seed = sys.argv[1], json.load(open(sys.argv[2])), int(sys.argv[3])
going, rng = True, random.Random(seed)
def stop(*_):
    global going
    going = False
signal.signal(signal.SIGTERM, stop)
while going:
    number, stream = rng.randrange(len(plan)), rng.random() < 0.7
    print(json.dumps({"asked": number}), flush=True)
    try:
        data = json.dumps({**plan[number], "stream": stream}).encode()
        request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=600) as reply:
            if stream:
                lines = [line.decode().strip().removeprefix("data: ") for line in reply]
                assert "[DONE]" in lines, "the stream ended early"
                parts = [json.loads(line)["choices"][0]["delta"].get("content") or "" for line in lines if line[:1] == "{"]
                text = "".join(parts)
            else:
                text = json.load(reply)["choices"][0]["message"]["content"]
        print(json.dumps({"answered": number, "text": text.strip()}), flush=True)
    except Exception as error:
        print(json.dumps({"failed": number, "error": repr(error)[:300]}), flush=True)
"""


class Client:
    """A process that asks until it is stopped; what it says goes to a file."""

    def __init__(self, url: str, plan: Path, seed: int, folder: Path) -> None:
        self.said, self.killed = folder / f"client-{seed}", False
        with self.said.open("w") as out:
            self.process = subprocess.Popen([sys.executable, "-c", CLIENT, url, str(plan), str(seed)], stdout=out)

    def kill(self) -> None:
        self.killed = True
        self.process.kill()
        self.process.wait()

    def lines(self) -> list[dict]:
        text = self.said.read_text()
        return [json.loads(line) for line in text.split("\n")[: None if text.endswith("\n") else -1] if line]


def memory(server: Server) -> float:
    """MB of all of the server's processes, each shared page counted once."""
    total = 0.0
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(path.read_text().rpartition(")")[2].split()[2]) == server.process.pid:  # its process group
                rollup = (path.parent / "smaps_rollup").read_text()
                total += int(re.search(r"^Pss:\s+(\d+)", rollup, re.M)[1]) / 1024  # type: ignore[index]
        except (OSError, ValueError):
            continue
    return total


def running(server: Server) -> float:
    metrics = urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics").read().decode()
    found = [float(n) for n in re.findall(r"^vllm:num_requests_(?:running|waiting)\{.*\} (\S+)$", metrics, re.M)]
    return sum(found)


def soak(minutes: float, clients: int, seed: int) -> bool:
    """True if every client that lived got every answer, and each is the one of `generate`."""
    rng, hf = random.Random(seed), HuggingFace()
    asked = cases(PROMPTS)
    plan = [body(case, **({} if wish is None else {"vlm_fix": wish})) for wish, _ in WISHES for case in asked]
    right = [
        hf.processor.decode(answer.tokens, skip_special_tokens=True).strip()
        for _, spec in WISHES
        for answer in hf.answers(spec, asked)
    ]
    with tempfile.TemporaryDirectory() as name:
        folder, server = Path(name), Server(Path(name) / "log", "--method", METHOD)
        write_atomic(folder / "plan.json", json.dumps(plan))
        try:
            server.wait()
            for one in plan:  # each once, alone: the warm-up
                server.ask(one)
            made = [Client(server.url, folder / "plan.json", number, folder) for number in range(clients)]
            living, sizes = list(made), []
            end = time.monotonic() + 60 * minutes
            while time.monotonic() < end:
                time.sleep(rng.uniform(1, 5))
                victim = rng.choice(living)
                living.remove(victim)
                victim.kill()
                made.append(Client(server.url, folder / "plan.json", len(made), folder))
                living.append(made[-1])
                sizes.append(memory(server))
            for client in living:
                client.process.send_signal(signal.SIGTERM)
            for client in living:
                client.process.wait(600)
            left = 60
            while running(server) and left:
                left, _ = left - 1, time.sleep(1)
            told = [(client, client.lines()) for client in made]
        except BaseException:
            print(server.log()[-3000:])
            raise
        finally:
            server.close()
    return judged(told, right, sizes, left)


def judged(told: list[tuple[Client, list[dict]]], right: list[str], sizes: list[float], left: int) -> bool:
    answers = [line for _, lines in told for line in lines if "answered" in line]
    failed = [line for _, lines in told for line in lines if "failed" in line]
    lost = [
        client.said.name
        for client, lines in told
        if not client.killed and sum("asked" in line for line in lines) != sum("asked" not in line for line in lines)
    ]
    changed = [line for line in answers if line["text"] != right[line["answered"]]]
    tenth = max(1, len(sizes) // 10)
    early, late = sum(sizes[tenth : 2 * tenth]) / tenth, sum(sizes[-tenth:]) / tenth
    killed = sum(client.killed for client, _ in told)
    print(
        f"{len(told) - killed} clients at once, {killed} killed; {len(answers)} answers, {len(changed)} changed, {len(failed)} "
        f"failed, {len(lost)} clients lost one; {'no' if left else 'a'} request of a dead client is left; server {early:.0f} MB, "
        f"later {late:.0f} MB ({late / early - 1:+.2%})"
    )
    for line in [*changed, *failed][:10]:
        print(line, right[line.get("answered", 0)])
    return bool(answers and left) and not (changed or failed or lost) and late / early - 1 < GROWTH
