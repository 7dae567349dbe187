"""What a newcomer writes wrong in the first hour, and the message that says what to write instead.

Each mistake is the code as it is typed, and a part of its message. The error comes where the mistake is, before any
LM call or training.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

import lmpipe
import lmpipe.extend
import optimizers
from lmpipe import Example, Input, LmpipeError, Module, Output, Predict, Prediction, ScriptedLM, Session
from tests.scripted import KeepingTrainer

TROUBLESHOOTING = Path(__file__).parents[2] / "docs" / "troubleshooting.md"


class Ask(Module):
    """The program of a newcomer."""

    def __init__(self) -> None:
        self.predict = Predict("question -> answer")

    def forward(self, question: str) -> Prediction:
        return self.predict(question=question)


class Untyped:
    """A signature whose fields lack their types."""

    question = Input()
    answer = Output()


class Unmarked:
    """A signature with an input that is not declared as one."""

    question: str
    answer: str = Output()


def program(line: str, has_predictor: bool = True) -> Module:
    """A program whose ``forward`` has one line."""
    init = "self.predict = Predict('question -> answer')" if has_predictor else "pass"
    names: dict[str, Any] = {**vars(lmpipe)}
    exec(  # noqa: S102
        "class Ask(Module):\n"
        f"    def __init__(self):\n        {init}\n"
        f"    def forward(self, question):\n        {line}\n",
        names,
    )
    return cast(Module, names["Ask"]())


def names(tmp_path: Path) -> dict[str, Any]:
    """What the mistakes can use: all public names, numpy, and what a newcomer has by then."""
    lm = ScriptedLM(lambda request: "answer: yes")
    state = lmpipe.initial_state(Ask(), Session(lm=lm))
    (tmp_path / "notes.txt").write_text("a file")
    return {
        **{name: getattr(optimizers, name) for name in optimizers.__all__},
        **{name: getattr(lmpipe, name) for name in lmpipe.__all__},
        "np": np,
        "lmpipe": lmpipe,
        "extend": lmpipe.extend,
        "optimizers": optimizers,
        "lm": lm,
        "session": Session(lm=lm),
        "state": state,
        "tuned": state.with_weights("lm", lmpipe.WeightState(base="scripted", adapter="a" * 32)),
        "Ask": Ask,
        "ask": Ask(),
        "Untyped": Untyped,
        "Unmarked": Unmarked,
        "load_embedder": lmpipe.extend.load_embedder,
        "program": program,
        "trainer": KeepingTrainer(),
        "train": [Example({"question": f"{number}?"}, {"answer": "yes"}) for number in range(12)],
        "run": tmp_path / "run",
        "file": tmp_path / "notes.txt",
    }


SESSIONS = [
    ("Session(lm='bundled')", "write Session(lm=load_lm('bundled'))"),
    ("Session(lm={'judge': 'bundled'})", "write Session(lm={'judge': load_lm('bundled')})"),
    ("Session(lm={1: lm})", "the name of a role is 1; it must be of the type str"),
    ("Session(lm=load_lm)", "write Session(lm=load_lm('bundled'))"),
    ("Session(lm=lm, store='runs/x')", "write Session(…, store=RunStore('runs/x'))"),
    ("Session(lm=lm, sampling={'temperature': 0.7})", "write Session(…, sampling=Sampling(temperature=0.7))"),
    ("Session(lm=lm, state={})", "write Session(…, state=initial_state(program, session))"),
    ("Session(lm=lm, embedder='bundled')", "write Session(…, embedder=load_embedder('bundled'))"),
    ("Session(lm=lm, retriever='bm25:texts.tsv')", "write Session(…, retriever=load_retriever('bm25:texts.tsv'))"),
    ("Session(lm=lm, template='{question}')", "write Session(…, template=Template())"),
    ("Session(lm=lm, callbacks=print)", "pass a list of Callable, also for a single one; write it in brackets"),
    ("Session(lm=lm, structured='yes')", "write structured=True or structured=False"),
    ("Session(lm=lm, quiet='yes')", "write quiet=True or quiet=False"),
    ("Session(lm=lm, progress=False)", "progress is False; it must be of the type Progress; write Session(…, quiet=T"),
    ("Session(lm=lm, seed='1')", "seed is '1'; it must be a whole number"),
    ("Session(lm=lm, max_concurrency=0)", "max_concurrency is 0; it must be a whole number, at least 1"),
    ("RunStore(file)", "is a file; write the path of a directory, such as RunStore('runs/first')"),
    ("RunStore('')", "'' is not the path of a directory; write RunStore('runs/first')"),
    ("RunStore(RunStore(run))", "is open already; use that store as it is: Session(…, store=store)"),
]
EXAMPLES = [
    (
        "Example(question='Why?', answer='yes')",
        "write Example(inputs={'question': 'Why?', 'answer': 'yes'}, labels={…})",
    ),
    ("Example('Why?', 'yes')", "pass a dict of field names to values, such as inputs={'question': 'Why?'}"),
    ("Example({'question': 'Why?'}, 'yes')", "such as labels={'answer': 'yes'}"),
    ("Example({'question': 'Why?'}, id=3)", "pass a string, such as id='3'"),
    ("Example({1: 'Why?'})", "names of fields are strings, so write '1'"),
    ("train[0].answer", "an Example has no attribute 'answer'; write example.labels['answer']"),
    ("train[0].question", "write example.inputs['question']"),
    (
        "evaluate(ask, [{'question': 'Why?', 'answer': 'yes'}], exact_match, session)",
        "examples[0] is {'question': 'Why?', 'answer': 'yes'}, not of the type Example; write "
        "Example(inputs={'question': 'Why?'}, labels={'answer': 'yes'})",
    ),
    ("evaluate(ask, [('Why?', 'yes')], exact_match, session)", "write Example(inputs={'question': '…'}, labels={"),
    ("evaluate(ask, [], exact_match, session)", "examples is empty, so there is nothing to score; pass at least one"),
    ("evaluate(ask, train[0], exact_match, session)", "pass a list of Example, also for a single one; write it in"),
    (
        "evaluate(ask, [Example({'q': 'Why?'})], exact_match, session)",
        "Ask.forward() takes question: 'q' is not one of",
    ),
    (
        "evaluate(ask, [Example({'question': 'Why?', 'answer': 'yes'})], exact_match, session)",
        "'answer' is not one of them; rename them, or move what the program does not take to the labels",
    ),
]
SIGNATURES = [
    ("Predict('question, answer')", "needs exactly one '->' between inputs and outputs; write 'question, context ->"),
    ("Predict('question → answer')", "write 'question -> answer'"),
    ("Predict('question => answer')", "write 'question -> answer'"),
    ("Predict('question ->')", "write the outputs after the arrow, such as 'question -> answer'"),
    ("Predict('question -> answer: string')", "unknown type 'string'"),
    ("Predict('question -> answer: string')", "did you mean 'str'?"),
    ("Predict('question -> answer: Optional[str]')", "write 'str | None' for Optional[str]"),
    ("Predict('question -> answer: List[str]')", "did you mean 'list'?"),
    ("Predict('question -> colour: Colour')", "pass others in types={'Colour': …}"),
    ("Predict('question -> answer: Literal[yes, no]')", "write Literal['yes', 'no']"),
    ("Predict('question -> answer: Literal[‘yes’, ‘no’]')", "write straight quotes, ' or \", in place of ‘"),
    ("Predict('question -> class')", "'class' is a word of Python, so write 'class_' or another name"),
    ("Predict('my question -> answer')", "'my question' cannot name a field, so write 'my_question'"),
    ("Predict('question, question -> answer')", "field 'question' appears twice in a signature; give each field"),
    ("Predict('question: str = 3 -> answer')", "leave out *, / and defaults"),
    ("Predict(['question', 'answer'])", "is not a signature; write 'question -> answer' with your own fields"),
    ("Predict(Untyped)", "Untyped.question has no type; write question: str = Input()"),
    ("Predict(Unmarked)", "Unmarked.question must be set to Input() or Output(); write question: str = Input()"),
    ("Predict(Unmarked())", "is an object; pass the class itself: Unmarked"),
    ("Predict(type('Answers', (Signature,), {}))", "a class of fields has no base class; write class Answers: …"),
    ("Predict('question -> answer', 3)", "instructions is 3; it must be of the type str"),
    ("Predict('question -> answer', temperature=0.3)", "write sampling=Sampling(temperature=0.3)"),
    ("Predict('question -> answer', sampling={'top_p': 0.3})", "write Predict(…, sampling=Sampling(top_p=0.3))"),
    (
        "Predict('question -> answer', rol='judge')",
        "a predictor has no argument 'rol'; it has instructions, role, samp",
    ),
    ("Predict('question -> answer', rol='judge')", "did you mean 'role'?"),
    ("ChainOfThought('question -> reasoning, answer')", "ChainOfThought adds the output 'reasoning' itself; leave"),
    ("ChainOfThought('question -> answer', max_tokens=3)", "write sampling=Sampling(max_tokens=3)"),
]
CALLS = [
    ("ask('Why?')", "was passed to Ask without the input's name; write program(question='Why?')"),
    ("Predict('question, context -> answer')('Why?', 'x')", "write program(question='Why?', context='x')"),
    ("ChainOfThought('question -> answer')('Why?')", "write program(question='Why?')"),
    ("program('return self.predict(question)')(question='Why?')", "write self.…(question='Why?')"),
    ("ask(qestion='Why?')", "Ask takes the inputs question; 'qestion' is not one of them; did you mean 'question'?"),
    ("Predict('question -> answer')(qestion='Why?')", "did you mean 'question'?"),
    ("Predict('question, context -> answer')(question='Why?')", "'context' is missing"),
    (
        "program('return self.predict(qestion=question)')(question='Why?')",
        "missing question and unknown qestion; its in",
    ),
    ("program('return \"yes\"')(question='Why?')", "returned str, not a Prediction; return what a module returned,"),
    ("program('return {\"answer\": \"yes\"}')(question='Why?')", "write: return Prediction(answer='yes')"),
    (
        "program('self.predict(question=question)')(question='Why?')",
        "returned NoneType, not a Prediction; does it lack",
    ),
    ("program('return Prediction(\"yes\")')(question='Why?')", "an output has a name; write Prediction(answer='yes')"),
    (
        "program('return Predict(\"question -> answer\")(question=question)')(question='Why?')",
        "Predict is not part of the running program; make it in __init__",
    ),
    (
        "program('self.last = question; return self.predict(question=question)')(question='Why?')",
        "values of one example to variables of forward()",
    ),
    ("ask(question='Why?').anwser", "this prediction has no field 'anwser'; it has answer; did you mean 'answer'?"),
    ("ask(question='Why?')['anwser']", "did you mean 'answer'?"),
    ("setattr(ask(question='Why?'), 'answer', 'no')", "create a new one: Prediction(**{**prediction, 'answer': 'no'})"),
]
METRICS = [
    ("evaluate(ask, train, 'exact_match', session)", "pass a function, such as: def metric(example, prediction)"),
    ("evaluate(ask, train, None, session)", "metric is None; pass a function"),
    ("evaluate(ask, train, ask, session)", "metric is the program Ask; the order is evaluate(program, examples,"),
    (
        "evaluate(ask, train, lambda prediction: 1.0, session)",
        "metric is called with (example, prediction), and <lambda>",
    ),
    ("evaluate(ask, train, lambda example, prediction, trace: 1.0, session)", "(missing a required argument: 'trace')"),
    ("evaluate(ask, train, lambda gold, pred: None, session)", "does it lack a `return`?"),
    ("evaluate(ask, train, lambda gold, pred: 'yes', session)", "it must return a number in [0, 1], or (number, text)"),
    ("evaluate(ask, train, lambda gold, pred: 85, session)", "for a percentage, write `return 85 / 100`"),
    ("evaluate(ask, train, lambda gold, pred: np.ones(2), session)", "an array; write `return float(scores.mean())`"),
    ("evaluate(ask, train, lambda gold, pred: gold.answer == 'x', session)", "write example.labels['answer']"),
    (
        "evaluate(ask, train, lambda gold, pred: gold.labels['x'], session)",
        "the labels are 'answer', the prediction has",
    ),
    ("evaluate(ask, train, lambda gold, pred: pred.anwser, session)", "did you mean 'answer'?"),
    (
        "evaluate(ask, [Example({'question': 'Why?'}, {'label': 'yes'})], exact_match, session)",
        "exact_match needs the field 'answer' in the labels; fields there: 'label'; name it 'answer', or write",
    ),
    (
        "BootstrapFewShotRandomSearch('exact_match')",
        "metric is 'exact_match'; it must be a function; write exact_match,",
    ),
    (
        "BootstrapFewShotRandomSearch(lambda prediction: 1.0)",
        "metric is called with (example, prediction), and <lambda>",
    ),
]
LMS = [
    ("load_lm('bundeld')", "did you mean 'bundled'?"),
    ("load_lm('Bundled')", "did you mean 'bundled'?"),
    ("load_lm('Qwen/Qwen3-0.6B')", "did you mean 'hf:Qwen/Qwen3-0.6B'?"),
    ("load_lm('huggingface/Qwen/Qwen3-0.6B')", "did you mean 'hf:Qwen/Qwen3-0.6B'?"),
    ("load_lm('hf/Qwen/Qwen3-0.6B')", "did you mean 'hf:Qwen/Qwen3-0.6B'?"),
    ("load_lm('HF:Qwen/Qwen3-0.6B')", "did you mean 'hf:Qwen/Qwen3-0.6B'?"),
    ("load_lm('hf: Qwen/Qwen3-0.6B')", "did you mean 'hf:Qwen/Qwen3-0.6B'?"),
    ("load_lm('hf:https://huggingface.co/Qwen/Qwen3-0.6B')", "did you mean 'hf:Qwen/Qwen3-0.6B'?"),
    ("load_lm('https://huggingface.co/Qwen/Qwen3-0.6B')", "did you mean 'hf:Qwen/Qwen3-0.6B'?"),
    ("load_lm('openai/local:Qwen/Qwen3-0.6B')", "did you mean 'hf:Qwen/Qwen3-0.6B'?"),
    ("load_lm('hf:bundled')", "did you mean 'bundled'?"),
    ("load_lm('huggingface/CodeBERTa')", "did you mean 'hf:huggingface/CodeBERTa'?"),
    ("load_lm('anthropic/claude-x')", "write 'openai:claude-x@https://HOST/v1'"),
    ("load_lm('ollama/llama3.2:1b')", "write 'openai:llama3.2:1b@https://HOST/v1'"),
    ("load_lm('openai/gpt-4o')", "write 'openai:gpt-4o@https://api.openai.com/v1'"),
    ("load_embedder(None)", "spec is None; it must be of the type str; write load_embedder('bundled')"),
    ("load_embedder('org/encoder')", "did you mean 'hf:org/encoder'?"),
    ("load_lm('gpt-4o')", "for a model behind an API, write 'openai:gpt-4o@https://HOST/v1'"),
    ("load_lm('openai:gpt-4o')", "'gpt-4o' names no server; write openai:MODEL@http://host:8000/v1"),
    ("load_lm(None)", "spec is None; it must be of the type str; write load_lm('bundled')"),
    ("load_lm(lm)", "is an LM already; use it as it is: Session(lm=lm)"),
    ("load_lm('hf:/missing')", "there is no such folder; check the path, or name a model of the hub, such as 'hf:"),
    ("load_lm(f'hf:{file.parent}')", "the folder has no config.json; write the folder that save_pretrained wrote"),
    ("load_lm('bundled', dtyp='float32')", "there is no option dtyp; options are name, dtype, quantization,"),
    ("load_lm('bundled', dtyp='float32')", "did you mean 'dtype'?"),
    ("load_retriever(None)", "spec is None; it must be of the type str; write load_retriever('bm25:passages.jsonl')"),
    ("ScriptedLM('yes')", "the script of a ScriptedLM is 'yes'; pass a function of the request"),
]
SETTINGS = [
    ("TuningConfig(method='LoRA')", "did you mean 'lora'?"),
    ("TuningConfig(rank=0)", "TuningConfig: rank is 0; it must be greater than 0"),
    ("TuningConfig(learning_rate='1e-4')", "TuningConfig: learning_rate is '1e-4'; it must be a number"),
    ("TuningConfig(epochs=1.5)", "TuningConfig: epochs is 1.5; it must be a whole number"),
    ("TuningConfig(schedule='cosin')", "did you mean 'cosine'?"),
    ("TuningConfig(dropout=1.5)", "TuningConfig: dropout is 1.5; it must be less than 1"),
    ("Sampling(temperature=-1)", "Sampling: temperature is -1; it must be a finite number, at least 0"),
    ("Sampling(max_tokens=0)", "Sampling: max_tokens is 0; it must be a whole number, at least 1"),
    ("Sampling(max_tokens='16')", "Sampling: max_tokens is '16'; it must be a whole number, at least 1"),
    ("Sampling(top_p=0)", "Sampling: top_p is 0; it must be above 0 and at most 1"),
    ("Sampling(stop='end')", "write stop=('end',)"),
    ("Budget(max_lm_calls=-1)", "max_lm_calls is -1; it must be a whole number, at least 0"),
    ("Budget(max_seconds='3h')", "max_seconds is '3h'; it must be a finite number, at least 0"),
    ("Retrieve(k='3')", "k of Retrieve is '3'; it must be a whole number, at least 1"),
    ("LocalTrainer('bundled')", "write LocalTrainer(load_lm('bundled'), TuningConfig())"),
    ("LocalTrainer(lm, {'rank': 8})", "write LocalTrainer(lm, TuningConfig(rank=8))"),
    (
        "LocalTrainer(lm)",
        "ScriptedLM cannot be trained; pass the LocalLM itself, without a cache, such as load_lm('bundled')",
    ),
]
OPTIMIZERS = [
    ("BootstrapFinetune(exact_match, lm)", "write LocalTrainer(lm, TuningConfig())"),
    ("BootstrapFinetune(exact_match, TuningConfig())", "write LocalTrainer(lm, TuningConfig(…))"),
    ("BootstrapFinetune(exact_match, type(trainer))", "write KeepingTrainer(…), not the class itself"),
    ("BootstrapFinetune(trainer, exact_match)", "trainer is <function exact_match"),
    ("BootstrapFewShot(exact_match, max_rounds='3')", "BootstrapFewShot: max_rounds is '3'; it must be a whole"),
    ("BetterTogether(exact_match, {'p': LabeledFewShot}, 'p')", "write LabeledFewShot(…), not the class itself"),
    (
        "BetterTogether(exact_match, [LabeledFewShot()], 'p')",
        "optimizers is [LabeledFewShot()]; it must",
    ),
    ("BetterTogether(exact_match, {'p': LabeledFewShot()}, 'p', budget=100)", "write Budget(max_lm_calls=1000)"),
    ("BetterTogether(exact_match, {'p': LabeledFewShot()}, 'p → p')", "no stage is called 'p → p'; write 'p -> p'"),
    ("BetterTogether(exact_match, {'p': LabeledFewShot()}, 'p, p')", "write 'p -> p'"),
    ("BetterTogether(exact_match, {'p': LabeledFewShot()}, 'P')", "no stage is called 'P'; did you mean 'p'?"),
    ("BetterTogether(exact_match, {'p': LabeledFewShot()}, ['p', 'p'])", "it must be a text, so write 'p -> p'"),
    ("BetterTogether(exact_match, {'p': LabeledFewShot()}, '')", "write 'vanilla' for a run without stages"),
    ("BetterTogether(exact_match, {'p': LabeledFewShot()}, 'p -> w')", "no stage is called 'w'; the stages are p"),
    ("LabeledFewShot().optimize(Ask, state, train, [], session)", "write Ask(…), not the class itself"),
    (
        "LabeledFewShot().optimize(ask, state, [], [], session)",
        "there are no training examples to learn from; pass some",
    ),
    ("LabeledFewShot().optimize(ask, state, train, 0.2, session)", "val is 0.2; pass a list of Example, such as"),
    (
        "LabeledFewShot().optimize(ask, state, session, train, [])",
        "write optimize(program, state, train, val, session)",
    ),
    ("evaluate(ask, train, session, exact_match)", "write evaluate(program, examples, metric, session)"),
    (
        "evaluate(ask, train, exact_match, lm)",
        "it must be of the type Session; write evaluate(program, examples, metri",
    ),
    ("evaluate(Ask, train, exact_match, session)", "program is <class 'tests.lmpipe.test_first_hour.Ask'>; it must"),
    ("initial_state(Ask, session)", "write Ask(…), not the class itself"),
    ("initial_state(ask, lm)", "it must be of the type Session; write Session(lm=lm)"),
    ("evaluate(ask, train, exact_match, session, measures=[len])", "write measures={'length': lambda trace: …}"),
    ("evaluate(ask, train, exact_match, session, measures={'length': 3})", "measures['length'] is 3; pass a function"),
    ("BootstrapFewShot(exact_match, teacher=ask)", "it must be of the type Teacher; write Teacher(program)"),
    ("predictors(Ask)", "write Ask(…), not the class itself"),
    ("Job(train[0], state)", "write Job(state, example)"),
    ("rollout(ask, train, session)", "not of the type Job; write Job(state, example)"),
]
SHORTCUT = [
    ("optimize(Ask, train, exact_match)", "write Ask(…), not the class itself"),
    ("optimize(ask, exact_match, train)", "write optimize(program, train, metric)"),
    ("optimize(exact_match, ask, train)", "write optimize(program, train, metric)"),
    ("optimize(train, ask, exact_match)", "write optimize(program, train, metric)"),
    ("optimize(ask, train, ask)", "write optimize(program, train, metric)"),
    ("optimize(ask, train, 'exact_match')", "pass a function, such as: def metric(example, prediction)"),
    (
        "optimize(ask, [{'question': 'Why?', 'answer': 'yes'}], exact_match)",
        "write Example(inputs={'question': 'Why?'}",
    ),
    (
        "optimize(ask, train, exact_match, val=0.2)",
        "val is 0.2; pass a list of Example, such as half of a shuffled list",
    ),
    (
        "optimize(ask, train[:2], exact_match)",
        "there are 2 different examples, too few to set some aside; pass at least",
    ),
    ("optimize(program('return Prediction(answer=question)', False), train, exact_match)", "has no predictor, so"),
    ("optimize(ask, train, exact_match, lm='bundeld')", "did you mean 'bundled'?"),
    ("optimize(ask, train, exact_match, lm=None)", "lm is None; it must be of the type LM; write optimize(…, lm='bu"),
    ("optimize(ask, train, exact_match, lm={'judge': lm}, strategy='p')", "write optimize(…, lm={…, 'lm': lm})"),
    ("optimize(ask, train, exact_match, select='worst')", "select is 'worst'; it must be 'last' or 'best'"),
    ("optimize(ask, train, exact_match, structured='no')", "write structured=True or structured=False"),
    ("optimize(ask, train, exact_match, quiet='no')", "write quiet=True or quiet=False"),
    ("optimize(ask, train, exact_match, trainer=3)", "trainer is 3; it must be of the type Trainer"),
    ("optimize(ask, train, exact_match, budget=100)", "write Budget(max_lm_calls=1000)"),
    ("optimize(ask, train, exact_match, sampling={'top_p': 0.3})", "write optimize(…, sampling=Sampling(top_p=0.3))"),
    (
        "optimize(ask, train, exact_match, stages={'k': LabeledFewShot()})",
        "stages has 'k', which the strategy 'p -> w -> p' does not name; leave it out, or write "
        "strategy='k -> p -> w -> p'",
    ),
    ("optimize(ask, train, exact_match, strategy='pwp')", "no stage is called 'pwp'; write 'p -> w -> p'"),
    ("optimize(ask, train, exact_match, strategy='p → w')", "write 'p -> w'"),
    ("optimize(ask, train, exact_match, strategy=['p', 'w'])", "it must be a text, so write 'p -> w'"),
    ("optimize(ask, train, exact_match, strategy='prompts')", "no stage is called 'prompts'; the stages are p, w"),
    ("optimize(ask, train, exact_match, stages=[LabeledFewShot()])", "write optimize(…, stages={'p': optimizer})"),
    ("optimize(ask, train, exact_match, out=session)", "write optimize(…, out='runs/first')"),
    (
        "optimize(ask, train, exact_match, lm=lm, strategy='p', out=file)",
        "is a file; write the path of a directory: optim",
    ),
    (
        "optimize(ask, train, exact_match, lm=lm, out=run)",
        "cannot be trained here; pass trainer=…, such as a LocalTrainer",
    ),
]
STATES = [
    ("PromptState('Answer.')", "the fields of PromptState have names; write instructions='Answer.'"),
    ("PromptState(instructions=3, demos=4)", "instructions is 3; it must be text. demos is 4; it must be a tuple"),
    ("WeightState(base='x', adpter='y')", "adpter does not exist; did you mean 'adapter'?"),
    (
        "ProgramState(prompts={'a': {'instruction': 'x'}}, weights={'lm': {'base': 3}})",
        "prompts.a: PromptState: instructions is missing. instruction does not exist; did you mean 'instructions'? "
        "weights.lm: WeightState: base is 3; it must be text",
    ),
    (
        "ProgramState(prompts={'a': 'Answer.'}, weights={})",
        "prompts.a is 'Answer.'; it must be of the type PromptState",
    ),
    (
        "state.with_prompt('predit', state.prompts['predict'])",
        "no predictor at 'predit'; this state has predict; did you",
    ),
    (
        "Session(lm=lm, state=tuned).register_adapters(tuned)",
        "pass the session the store that has it: Session(…, store=",
    ),
    (
        "Session(lm=lm, store=RunStore(run)).register_adapters(tuned)",
        "does not have it; pass the store that it was trained in, or copy its work with store.merge_from(",
    ),
    (
        "session.register_adapters(ProgramState(prompts={}, weights={'lm': WeightState(base='other')}))",
        "belong to 'other', but its LM is 'scripted'; load the LM that the state was made with,",
    ),
    (
        "evaluate(Predict('question -> answer'), train, exact_match, session, state=state)",
        "the state does not fit the program: it is for 'predict', and Predict has 'self'",
    ),
]
NAMES = [
    ("lmpipe.evalute", "did you mean 'evaluate'?"),
    ("lmpipe.Tuning", "write: from lmpipe import TuningConfig"),
    ("lmpipe.Imitation", "write: from lmpipe.extend import SFTLoss"),
    ("lmpipe.number_match", "lmpipe has no 'number_match'; write: from lmpipe.extend import number_match"),
    ("lmpipe.BetterTogether", "write: from optimizers import BetterTogether"),
    ("lmpipe.InputField", "write: from lmpipe import Input"),
    ("lmpipe.configure", "no setting is global; write: with Session(lm=lm): program(…)"),
    ("lmpipe.ReAct", "it is not in lmpipe; call your tools in the forward() of a Module"),
    ("lmpipe.inspect_history", "write: print(session.history(3))"),
    ("optimizers.BootstrapFewShotWithRandomSearch", "write: from optimizers import BootstrapFewShotRandomSearch"),
    ("optimizers.evaluate", "write: from lmpipe import evaluate"),
    ("optimizers.GEPPA", "did you mean 'GEPA'?"),
    ("extend.Session", "write: from lmpipe import Session"),
]
MISTAKES = [
    *SESSIONS,
    *EXAMPLES,
    *SIGNATURES,
    *CALLS,
    *METRICS,
    *LMS,
    *SETTINGS,
    *OPTIMIZERS,
    *SHORTCUT,
    *STATES,
    *NAMES,
]


def message_of(code: str, tmp_path: Path) -> str:
    """Runs code that is wrong, as a newcomer's script would, and returns its message."""
    available = names(tmp_path)
    with available["session"], pytest.raises((LmpipeError, AttributeError, KeyError, ImportError)) as caught:
        eval(code, available)  # noqa: S307
    return str(caught.value)


@pytest.mark.parametrize(("code", "message"), MISTAKES, ids=[code for code, _ in MISTAKES])
def test_a_mistake_is_answered_with_what_to_write(code: str, message: str, tmp_path: Path) -> None:
    assert message in message_of(code, tmp_path)


def test_a_spec_may_begin_at_the_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(LmpipeError, match=f"'{tmp_path}/model': there is no such folder"):
        lmpipe.load_lm("hf:~/model")


def test_a_program_that_is_called_without_a_session_says_how_to_open_one() -> None:
    with pytest.raises(LmpipeError, match=r"write: with Session\(lm=lm\): program\(…\)"):
        Ask()(question="Why?")


def test_a_message_hides_the_password_of_a_url() -> None:
    spec: Any = "openai:model@https://me:secret@host/v1"
    with pytest.raises(LmpipeError, match=r"write Session\(lm=load_lm\('openai:model@https://\*\*\*@host/v1'\)\)"):
        Session(lm=spec)


def test_a_class_of_the_user_is_named_in_types() -> None:
    answer = Predict("question -> answer: Shade", types={"Shade": int}).signature.outputs[0]
    assert answer.type is int


@pytest.mark.parametrize("value", [np.int64(3), np.float32(0.5), np.str_("yes"), np.bool_(True), np.array([[1, 2]])])
def test_values_of_numpy_are_taken_as_those_of_python(value: Any) -> None:
    example = Example({"question": value}, {"answer": [value]})
    assert type(example.inputs["question"]) is type(value.tolist())
    assert example == Example({"question": value.tolist()}, {"answer": [value.tolist()]})


def test_settings_and_seeds_of_numpy_are_taken_as_those_of_python() -> None:
    three: Any = np.int64(3)
    lm = ScriptedLM(lambda request: "answer: yes")
    assert type(lmpipe.TuningConfig(rank=three).rank) is int
    assert type(lmpipe.Sampling(temperature=np.float64(0.5)).temperature) is float
    assert type(lmpipe.Budget(max_lm_calls=three).max_lm_calls) is int
    assert type(optimizers.BootstrapFewShot(lmpipe.exact_match, max_rounds=three).max_rounds) is int
    assert Session(lm=lm, seed=three).for_stage("p").seed == Session(lm=lm, seed=3).for_stage("p").seed


@pytest.mark.parametrize("score", [np.float32(1), np.bool_(True), True, np.array(1.0), 1])
def test_a_metric_may_return_a_truth_value_or_a_number_of_numpy(score: Any) -> None:
    session = Session(lm=ScriptedLM(lambda request: "answer: yes"))
    assert lmpipe.evaluate(Ask(), [Example({"question": "Why?"})], lambda example, prediction: score, session).mean == 1


def test_a_metric_of_dspy_with_an_optional_trace_is_taken() -> None:
    def metric(gold: Example, pred: Prediction, trace: object = None) -> bool:
        return bool(gold.labels["answer"] == pred.answer)

    session = Session(lm=ScriptedLM(lambda request: "answer: yes"))
    assert lmpipe.evaluate(Ask(), [Example({"question": "Why?"}, {"answer": "yes"})], metric, session).mean == 1


def test_lists_are_taken_where_settings_are_tuples() -> None:
    modules: Any = ["q_proj", "v_proj"]
    stop: Any = ["\n"]
    assert lmpipe.TuningConfig(target_modules=modules).target_modules == ("q_proj", "v_proj")
    assert lmpipe.Sampling(stop=stop).stop == ("\n",)


def test_the_names_that_are_suggested_exist() -> None:
    """Every name that the message of an absent one recommends can be imported."""
    earlier = ["Tuning", "Imitation", "Preference", "PolicyGradient", "Nearest", "parse_strategy", "Run", "GEPA"]
    of_dspy = ["BootstrapFewShotWithRandomSearch", "ChatAdapter", "Evaluate", "InputField", "OutputField", "majority"]
    for name in [*earlier, *of_dspy, "BestOfN", "Refine", "answer_exact_match"]:
        with pytest.raises(ImportError) as caught:
            getattr(lmpipe, name)
        exec(str(caught.value).partition("write: ")[2])  # noqa: S102


def test_every_error_of_the_troubleshooting_page_is_one_that_a_mistake_raises(tmp_path: Path) -> None:
    """The page quotes messages with … in place of what differs."""
    section = TROUBLESHOOTING.read_text().partition("\n## Errors\n")[2].partition("\n## ")[0]
    quoted = re.findall(r"^\| `(.+?)` \|", section, re.MULTILINE)
    messages = []
    for number, (code, _) in enumerate(MISTAKES):
        (folder := tmp_path / str(number)).mkdir()
        messages.append(message_of(code, folder))
    messages.append("no session is active; write: with Session(lm=lm): program(…)")
    assert len(quoted) > 20
    unknown = [
        text for text in quoted if not any(re.search(re.escape(text).replace("…", ".*"), found) for found in messages)
    ]
    assert unknown == []
