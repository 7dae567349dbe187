"""Multi-hop question answering over your own passages.

The program is `programs.MultiHop`: it searches twice, reads the passages, and answers. The passages are a file of JSON
objects with ``pid``, ``title`` and ``text``, which this script first writes; BM25 searches them. To search a ColBERT
index instead, build it with ``lmpipe index build passages.jsonl FOLDER`` and call ``load_retriever("FOLDER")``.

    python multihop_qa.py --lm bundled --question "Into which sea does the river of Vienna flow?"
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from lmpipe import Example, Job, Sampling, Session, initial_state, load_lm, load_retriever, rollout
from lmpipe.extend import answer_f1
from programs import MultiHop

PASSAGES = Path("passages.jsonl")
TEXTS = {
    "Vienna": "Vienna is the capital of Austria and lies on the Danube.",
    "Danube": "The Danube rises in the Black Forest and flows into the Black Sea.",
    "Paris": "Paris is the capital of France and lies on the Seine.",
    "Seine": "The Seine rises in Burgundy and flows into the English Channel.",
    "Rome": "Rome is the capital of Italy and lies on the Tiber.",
    "Tiber": "The Tiber rises in the Apennines and flows into the Tyrrhenian Sea.",
}


def write_passages() -> None:
    """Writes the passages, one JSON object a line."""
    rows = [{"pid": str(n), "title": title, "text": text} for n, (title, text) in enumerate(TEXTS.items())]
    PASSAGES.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    """Answers the question and prints every search that led to the answer."""
    parser = argparse.ArgumentParser(description="Answer a question from passages in two hops.")
    parser.add_argument("--lm", default="bundled", help="the LM to run on, in the form that load_lm reads")
    parser.add_argument("--question", default="Into which sea does the river of Vienna flow?")
    parser.add_argument("--answer", default="the Black Sea", help="the right answer, which the metric looks for")
    options = parser.parse_args()

    write_passages()
    session = Session(
        lm=load_lm(options.lm),
        retriever=load_retriever(f"bm25:{PASSAGES}"),
        sampling=Sampling(max_tokens=64),
        structured=True,
    )
    program = MultiHop(hops=2, k=2)
    example = Example({"question": options.question}, {"answer": options.answer})
    trace = rollout(program, [Job(initial_state(program, session), example)], session, answer_f1)[0]
    for step in trace.steps:
        print(f"{step.path}: {dict(step.outputs or {})}")
    print(f"score {trace.score:.2f}", trace.error or "")


if __name__ == "__main__":
    main()
