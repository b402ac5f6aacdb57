"""The task that comes for lm-eval: its questions are the same every time, and the novel has their answers."""

import re

import yaml

from benchmarks.lm_eval import next_sentence
from benchmarks.lm_eval.next_sentence import NOVEL, PASSAGES, documents


def test_the_right_sentence_is_the_one_that_follows() -> None:
    text = re.sub(r"\s+", " ", NOVEL.read_text(encoding="utf-8"))
    found = documents()
    assert len(found) == PASSAGES and found == documents()
    for document in found:
        right = document["sentences"][document["next"]]
        assert f"{document['passage']} {right}" in text
        assert len(set(document["sentences"])) == 4
    assert {document["next"] for document in found} == {0, 1, 2, 3}


def test_the_task_names_what_its_questions_hold() -> None:
    file = NOVEL.parents[2] / "benchmarks" / "lm_eval" / "next_sentence.yaml"
    task = yaml.safe_load(file.read_text().replace("!function ", ""))
    assert task["custom_dataset"] == f"next_sentence.{next_sentence.dataset.__name__}"
    assert {task["doc_to_text"], task["doc_to_choice"], task["doc_to_target"]} == set(documents()[0])
