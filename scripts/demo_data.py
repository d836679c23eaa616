"""Write the demo's training and held-out conversations as JSONL `messages`.

Data: the Chit-Chat Challenge conversations of Brigham Young University's PCC lab, from the package `chitchat-dataset`
0.9.0, which states the MIT licence in its metadata and carries its text (Copyright 2019 Perception, Control and
Cognition Lab; Myers, Etchart and Fulda, "Conversational Scaffolding", 2020). People typed them to one another and
nobody moderated them, so they are fetched, never kept in this repository.

    python scripts/demo_data.py chitchat_dataset-0.9.0-py3-none-any.whl FOLDER
"""

import json
import random
import sys
import zipfile
from pathlib import Path

TURNS = 10  # even, so that a conversation ends on the assistant's side
HELD_OUT = 16


def conversations(wheel: Path) -> list[list[dict[str, str]]]:
    """The first `TURNS` turns of every conversation that its participant rated above the middle of the 1 to 10 scale.

    Whoever speaks first is the user. Messages sent in a row are one turn.
    """
    with zipfile.ZipFile(wheel) as archive:
        dataset = json.loads(archive.read("chitchat_dataset/dataset.json"))
    chosen = []
    for conversation in dataset.values():
        ratings = conversation.get("ratings") or {}
        if len(conversation["messages"]) < TURNS or min(map(int, ratings.values()), default=0) <= 5:
            continue
        turns = [" ".join(message["text"].strip() for message in turn) for turn in conversation["messages"][:TURNS]]
        if all(turns):
            roles = ("user", "assistant") * (TURNS // 2)
            chosen.append([{"role": role, "content": text} for role, text in zip(roles, turns, strict=True)])
    random.Random(0).shuffle(chosen)
    return chosen


def main() -> None:
    wheel, folder = Path(sys.argv[1]), Path(sys.argv[2])
    chosen = conversations(wheel)
    for name, part in (("held-out", chosen[:HELD_OUT]), ("train", chosen[HELD_OUT:])):
        lines = "".join(json.dumps({"messages": messages}, ensure_ascii=False) + "\n" for messages in part)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        print(f"{len(part)} conversations in {folder / name}.jsonl")


if __name__ == "__main__":
    main()
