"""Training of ColBERT encoders: loss, recall, saved checkpoints, resumed trainings, and the command."""

from __future__ import annotations

import importlib.util
import json
import math
import string
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from lmpipe.cli import app
from lmpipe.errors import ConfigChanged, ConfigError, TrainingDiverged
from lmpipe.retrieval.colbert import ColbertEncoder, load_encoder
from lmpipe.retrieval.colbert.network import ColbertNetwork
from lmpipe.retrieval.colbert.settings import ColbertSettings
from lmpipe.retrieval.colbert.tokenizer import ColbertTokenizer
from lmpipe.retrieval.passages import PassageText, read_passages
from lmpipe.retrieval.training.fit import ColbertTrainingConfig
from lmpipe.retrieval.training.loss import Collator, batch_loss, maxsim
from lmpipe.retrieval.training.mining import TrainingExample, rank_passages, recall_at_k, sample_training_examples
from lmpipe.retrieval.training.questions import Question, find_gold_passages, read_questions
from lmpipe.retrieval.training.train import RoundResult, TrainingData, train_encoder
from tests.retrieval.colbert_ai import reference
from tests.tiny_bert import tiny_checkpoint

# a question contains one letter and its gold passage another: only training reveals which
LETTERS = string.ascii_lowercase
PASSAGES = [PassageText(str(number), f"&lt;{letter}", f"{letter} 1 2") for number, letter in enumerate(LETTERS)]
QUESTIONS = [
    Question(f"who is {letter} 3", (f"<{LETTERS[(number + 7) % len(LETTERS)]}",))
    for number, letter in enumerate(LETTERS)
]
TUNING = ColbertTrainingConfig(
    rounds=2,
    epochs=20,
    batch_size=13,
    negatives=2,
    depth=10,
    learning_rate=1e-3,
    temperature=0.5,
    checkpoint_steps=15,
)


def tiny_encoder(**settings: Any) -> ColbertEncoder:
    return ColbertEncoder(tiny_checkpoint(ColbertSettings(query_maxlen=10, doc_maxlen=20, **settings)), "tiny")


def train(folder: Path, tuning: ColbertTrainingConfig = TUNING, **settings: Any) -> list[RoundResult]:
    data = TrainingData(PASSAGES, QUESTIONS, QUESTIONS)
    return train_encoder(tiny_encoder(**settings), data, folder / "trained", tuning)


@pytest.mark.parametrize("query_expansion", [True, False], ids=["with masks", "without"])
def test_the_loss_falls_and_gold_passages_are_found(tmp_path: Path, query_expansion: bool) -> None:
    before, *rounds = train(tmp_path, do_query_expansion=query_expansion)
    assert [result.number for result in (before, *rounds)] == [0, 1, 2]
    assert [len(result.losses) for result in rounds] == [40, 40]  # 26 questions, 13 a step, 20 epochs
    assert rounds[-1].losses[-1] < rounds[0].losses[0] / 2
    assert before.recall[2] < 0.5 < rounds[-1].recall[2]
    assert not (tmp_path / "unfinished-trained").exists()


@pytest.mark.skipif(importlib.util.find_spec("colbert") is None, reason="colbert-ai is absent")
def test_the_best_round_is_saved_and_loads_in_colbert_ai(tmp_path: Path) -> None:
    results = train(tmp_path)
    encoder = load_encoder(str(tmp_path / "trained"), precision="float32")
    rankings = rank_passages(encoder, PASSAGES, [question.text for question in QUESTIONS], 10, tmp_path)
    gold = find_gold_passages(QUESTIONS, PASSAGES)
    best = max(results, key=lambda result: result.score)
    assert {k: recall_at_k(rankings, gold, k) for k in (2, 5, 10)} == pytest.approx(best.recall)
    with reference(tmp_path / "trained") as colbert:
        queries = colbert.queryFromText([question.text for question in QUESTIONS])
    assert torch.allclose(encoder.encode_queries([question.text for question in QUESTIONS]), queries, atol=1e-5)


def test_a_resumed_training_ends_like_an_uninterrupted_one(tmp_path: Path) -> None:
    class Kill(Exception):
        pass

    class Progress:
        steps = 0

        def add_task(self, description: str, *, total: float | None = None) -> str:
            return description

        def advance(self, task_id: str, advance: float = 1) -> None:
            self.steps += int(advance) if task_id.startswith("training") else 0
            if self.steps == 63:  # in the second round, after a checkpoint
                raise Kill

        def remove_task(self, task_id: str) -> None: ...

    whole = train(tmp_path / "whole")
    data, out = TrainingData(PASSAGES, QUESTIONS, QUESTIONS), tmp_path / "cut" / "trained"
    out.parent.mkdir()
    with pytest.raises(Kill):
        train_encoder(tiny_encoder(), data, out, TUNING, progress=Progress())
    assert not out.exists()
    with pytest.raises(ConfigChanged):
        train_encoder(tiny_encoder(), data, out, replace(TUNING, rounds=1))
    counter = Progress()
    counter.steps = 100
    assert train_encoder(tiny_encoder(), data, out, TUNING, progress=counter) == whole
    assert counter.steps == 140  # steps of the second round before the kill are reported again, the first round is not
    assert load_encoder(str(out)).digest == load_encoder(str(tmp_path / "whole" / "trained")).digest


def test_without_validation_questions_the_last_round_is_kept(tmp_path: Path) -> None:
    tuning = replace(TUNING, epochs=1)
    results = train_encoder(tiny_encoder(), TrainingData(PASSAGES, QUESTIONS), tmp_path / "trained", tuning, seed=3)
    assert [(result.number, result.recall) for result in results] == [(1, {}), (2, {})]
    assert load_encoder(str(tmp_path / "trained")).digest != tiny_encoder().digest


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "trained").mkdir()
    with pytest.raises(ConfigError, match="already exists"):
        train(tmp_path)


def test_negatives_are_high_in_the_ranking_and_never_gold() -> None:
    rankings, gold = [[4, 0, 3, 1, 2], [2, 3, 4, 0, 1], [0, 1, 2, 3, 4]], [((0,), (1, 4)), ((3,),), ()]
    examples = sample_training_examples(rankings, gold, negatives=2, epochs=50, seed=0)
    assert len(examples) == 100  # the third question has no gold passage
    assert {example.question for example in examples[:2]} == {0, 1}
    assert {example.negatives for example in examples if example.question == 0} == {(2, 3), (3, 2)}
    assert all(example.positives == (0, 1, 4) for example in examples if example.question == 0)
    assert {number for example in examples if example.question == 1 for number in example.negatives} == {0, 1, 2, 4}
    assert examples == sample_training_examples(rankings, gold, negatives=2, epochs=50, seed=0)
    assert examples != sample_training_examples(rankings, gold, negatives=2, epochs=50, seed=1)


def test_recall_counts_titles_and_not_their_passages() -> None:
    gold = [((0,), (1, 4)), ((3,),), ()]
    rankings = [[4, 2, 0], [0, 1, 2], [0, 1, 2]]
    assert [recall_at_k(rankings, gold, k) for k in (1, 2, 3)] == [0.25, 0.25, 0.5]


def test_the_loss_is_the_cross_entropy_of_each_gold_passage_against_others() -> None:
    checkpoint = tiny_checkpoint()
    tokenizer, network = ColbertTokenizer(checkpoint), ColbertNetwork(checkpoint)
    passages = ["a b c", "d, e f g h", "i", "j k?"]
    collator = Collator(tokenizer, ["a", "d e"], tokenizer.tokenize_passages(passages))
    batch = collator([TrainingExample(0, (0, 2), (3,)), TrainingExample(1, (1,), (0,))])
    with torch.no_grad():
        loss = float(batch_loss(network, batch, temperature=2.0, query_expansion=True))
    encoder = ColbertEncoder(checkpoint, "tiny", precision="float32")
    queries, encoded = encoder.encode_queries(["a", "d e"]), encoder.encode_passages(passages)
    scores = [
        torch.stack([(query @ row.T).max(1).values.sum() for row in encoded.vectors.split(encoded.lengths.tolist())])
        for query in queries
    ]
    pairs = [(0, 0, [0, 1, 3]), (0, 2, [1, 2, 3]), (1, 1, [0, 1, 2, 3])]  # question, gold passage, candidates
    expected = [
        float((scores[row][among] / 2).logsumexp(0) - scores[row][positive] / 2) for row, positive, among in pairs
    ]
    assert loss == pytest.approx(sum(expected) / 3, abs=1e-4)


def test_maxsim_leaves_out_tokens_without_a_vector() -> None:
    queries, passages = torch.randn(2, 3, 4), torch.randn(1, 5, 4)
    keeps = torch.tensor([[True, False, True, False, False]])
    expected = (queries @ passages[0, [0, 2]].T).max(2).values.sum(1)
    assert torch.allclose(maxsim(queries, passages, keeps)[:, 0], expected, atol=1e-6)


def test_titles_are_compared_without_escapes_and_missing_ones_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    questions = [Question("who", ("<a", "absent"))]
    assert find_gold_passages(questions, PASSAGES) == [((0,),)]
    assert "1 of 2 gold passages are not among the passages" in caplog.text
    with pytest.raises(ConfigError, match="no passage has the title"):
        find_gold_passages([Question("who", ("absent",))], PASSAGES)


def test_questions_are_read_in_both_forms_and_bad_lines_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "questions.jsonl"
    lines = [
        {"question": "who?", "titles": ["A &amp; B"]},
        {"question": "what?", "supporting_facts": {"title": ["C", "C", "D"], "sent_id": [0, 1, 0]}},
    ]
    path.write_text("\n\n".join(map(json.dumps, lines)))
    assert read_questions(path) == [Question("who?", ("A & B",)), Question("what?", ("C", "D"))]
    for bad in (
        '{"question": "who?"}',
        "{",
        "[]",
        '{"question": 1, "titles": ["A"]}',
        '{"question": "", "titles": []}',
        '{"question": " ", "titles": ["A"]}',
        "[" * 100_000,
        '{"question": "who?", "supporting_facts": {"title": [[]]}}',
        '{"question": "who?", "supporting_facts": []}',
    ):
        path.write_text(json.dumps(lines[0]) + "\n" + bad)
        with pytest.raises(ConfigError, match=r"questions\.jsonl, line 2: not a question"):
            read_questions(path)
    path.write_text("\ufeff" + json.dumps({"question": "wh\ud83d\0?", "titles": ["A\x1b"]}) + "\r\n")
    assert read_questions(path) == [Question("wh\ufffd\ufffd?", ("A\ufffd",))]
    assert "2 control characters or halves of surrogate pairs were replaced by U+FFFD" in caplog.text
    path.write_text("")
    with pytest.raises(ConfigError, match="contains no questions"):
        read_questions(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_questions(tmp_path / "absent.jsonl")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"rounds": 0}, "rounds is 0"),
        ({"epochs": True}, "epochs is True"),
        ({"negatives": -1}, "negatives is -1"),
        ({"temperature": 0}, "temperature is 0; it must be greater than 0"),
        ({"warmup": 1.5}, "warmup is 1.5; it must be less than 1"),
        ({"learning_rate": math.nan}, "learning_rate is nan; it must be a finite number"),
        ({"projection_rate": math.inf}, "projection_rate is inf; it must be a finite number"),
    ],
)
def test_settings_out_of_range_are_refused(change: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        ColbertTrainingConfig(**change)


def test_a_training_that_diverges_is_an_error_and_leaves_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(TrainingDiverged, match=r"diverged: .* at step \d+; train with a lower learning_rate") as caught:
        train(tmp_path, replace(TUNING, learning_rate=1e30, projection_rate=1e30, epochs=5))
    assert caught.value.step > 0
    assert not (tmp_path / "trained").exists()


def test_data_that_is_not_a_collection_is_refused() -> None:
    for wrong in (("text", QUESTIONS), (PASSAGES, "question"), (QUESTIONS, QUESTIONS)):
        with pytest.raises(ConfigError, match=r"passages|questions"):
            TrainingData(*wrong)  # type: ignore[arg-type]
    assert TrainingData(iter(PASSAGES), iter(QUESTIONS)) == TrainingData(PASSAGES, QUESTIONS)  # type: ignore[arg-type]


def test_the_command_trains_from_files(tmp_path: Path) -> None:
    tiny_encoder().save_pretrained(tmp_path / "tiny")
    passages, questions, out = tmp_path / "passages.jsonl", tmp_path / "questions.jsonl", tmp_path / "trained"
    records = [{"pid": passage.id, "title": passage.title, "text": passage.text} for passage in PASSAGES]
    passages.write_text("\n".join(map(json.dumps, records)))
    question_records = [{"question": question.text, "titles": list(question.titles)} for question in QUESTIONS]
    questions.write_text("\n".join(map(json.dumps, question_records)))
    options = {
        "encoder": tmp_path / "tiny",
        "passages": passages,
        "questions": questions,
        "validation": questions,
        "out": out,
        "epochs": 1,
        "learning-rate": 0.002,
    }
    arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    result = CliRunner().invoke(app, ["colbert", "train", *arguments], env={"COLUMNS": "200"}, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "recall@10" in result.output
    assert list(read_passages(passages)) == PASSAGES
    assert load_encoder(str(out)).query_maxlen == 10
