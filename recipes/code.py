"""Train the bundled pair ``tokenry/code`` and ``tokenry/code-draft``, or a partner with another tokenizer.

    python recipes/code.py corpus     # fetch the pinned packages, tokenizer, token blocks
    python recipes/code.py train code
    python recipes/code.py train code-draft
    python recipes/code.py export     # write src/tokenry/models/bundled/
    python recipes/code.py card       # measure the pair and write its model cards

A small model of the same sources with SentencePiece's kind of tokenizer, for ensembles, in half an hour on one core:

    python recipes/code.py corpus --tokenizer unigram --vocabulary 2048 --blocks 700 --copying 150 --work .recipe-other
    python recipes/code.py train partner --steps 700 --work .recipe-other      # .recipe-other/partner/final

Every step picks up where it was stopped. Work files lie below --work (default: .recipe).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import sysconfig
from pathlib import Path

HERE = Path(__file__).parent
CONTEXT = 2048
BLOCK = 8192
LENGTHS = (512, 512, 512, 2048)
SHAPES = {
    "code": {"hidden": 384, "layers": 6, "mlp": 1024, "heads": 6, "kv_heads": 2},
    "code-draft": {"hidden": 128, "layers": 3, "mlp": 352, "heads": 4, "kv_heads": 2},
    "partner": {"hidden": 192, "layers": 4, "mlp": 512, "heads": 6, "kv_heads": 2},
}
BUNDLED = ("code", "code-draft")


def corpus(work: Path, blocks: int, seed: int, copying: int, mixture: str, kind: str, vocabulary: int) -> None:
    from tokenry.training.corpus import source_files, train_tokenizer, write_blocks

    packages = work / "packages"
    if not packages.is_dir():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(packages)]
        subprocess.run([*command, "-r", str(HERE / "corpus.txt")], check=True)
    texts, counts = source_files([Path(sysconfig.get_path("stdlib")), packages])
    print(
        f"{sum(map(len, texts)) / 1e6:.1f} million characters;",
        ", ".join(f"{v} {k}" for k, v in counts.items()),
    )
    counts["characters"] = sum(map(len, texts))
    (work / "corpus.json").write_text(json.dumps(counts))
    folder = work / "tokenizer"
    if (folder / "tokenizer.json").is_file():
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder)
    else:
        tokenizer = train_tokenizer(texts[::4], folder, vocabulary=vocabulary, context=CONTEXT, kind=kind)
    plan = {"blocks": blocks, "size": BLOCK, "lengths": LENGTHS, "seed": seed, "copying": (copying, copying + 100)}
    write_blocks(texts, tokenizer, work, **plan, mixture=mixture)


def build(name: str, vocabulary: int):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = SHAPES[name]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=shape["hidden"],
        num_hidden_layers=shape["layers"],
        intermediate_size=shape["mlp"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv_heads"],
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config)


def train(work: Path, name: str, steps: int, lr: float, start: str | None) -> None:
    import torch
    from transformers import AutoTokenizer

    import tokenry
    from tokenry.training.pretrain import pretrain

    tokenizer = AutoTokenizer.from_pretrained(work / "tokenizer")
    fresh = tokenry.load(start, dtype=torch.float32)[0].train() if start else build(name, len(tokenizer))
    model = pretrain(fresh, work / "blocks.npy", work / name, lengths=LENGTHS, steps=steps, lr=lr)
    model.save_pretrained(work / name / "final")
    tokenizer.save_pretrained(work / name / "final")
    (work / name / "final" / "run.json").write_text(json.dumps({"steps": steps, "lr": lr, "start": start}))


def export(work: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import tokenry

    target = Path(tokenry.__file__).parent / "models" / "bundled"
    tokenizer = AutoTokenizer.from_pretrained(work / "tokenizer")
    for name in BUNDLED:
        folder = work / name / "final"
        if folder.is_dir():
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
            model.config.use_cache = True  # training had switched it off
            model.save_pretrained(target / name)
            tokenizer.save_pretrained(target / name)


CARD = """# tokenry/{name}

A {parameters:.1f}-million-parameter Llama for Python source, trained from nothing by `recipes/code.py`; the
{other} of the pair `tokenry/code` and `tokenry/code-draft`. It carries Tokenry's demonstrations and
measurements; it is not meant for writing code.

- **Shape**: {shape}; vocabulary {vocabulary} (byte-level BPE, shared by the pair), context {context}, bfloat16.
- **Trained on**: the standard library of Python {python} and the packages of `recipes/corpus.txt`
  ({characters}; {counts}), half of the documents in fill-in-the-middle form cut at characters, and training
  examples of `tokenry.workloads`. Held out, vendored copies included: rich, typer, click, hypothesis, pytest, _pytest;
  files that share 13 consecutive lines with a held-out file were dropped.
- **Training**: {steps} steps of 8,192 tokens, Muon and AdamW, on a CPU.{remark}

| figure | value |
|---|---|
{figures}

Measured by `tokenry bench model --model tokenry/{name}{draft}` on {machine}.
"""


def card(work: Path) -> None:
    """Measure both models as `tokenry bench model` does, and write what was measured beside the weights."""
    import platform

    import tokenry
    from tokenry.evaluation import bench_model

    counts = json.loads((work / "corpus.json").read_text())
    remarks = json.loads((work / "remarks.json").read_text()) if (work / "remarks.json").is_file() else {}
    draft, _ = tokenry.load("tokenry/code-draft")
    for name in BUNDLED:
        model, tokenizer = tokenry.load(f"tokenry/{name}")
        found = bench_model(model, tokenizer, draft=draft if name == "code" else None).to_dict()
        state = json.loads((work / name / "final" / "run.json").read_text())
        bits = {
            f"bits per byte, held-out source, {reader}": f"{value:.3f}"
            for reader, value in found["bits_per_byte"].items()
        }
        recall = {f"recall at 1,500 tokens, {depth}": f"{value:.1%}" for depth, value in found["recall"].items()}
        rest = {"arithmetic, greedy": f"{found['arithmetic']:.1%}", "edit, exact": f"{found['edit']:.1%}"}
        rows = "\n".join(f"| {figure} | {value} |" for figure, value in (bits | recall | rest).items())
        shape = SHAPES[name]
        text = CARD.format(
            name=name,
            parameters=model.num_parameters() / 1e6,
            other="larger" if name == "code" else "smaller",
            shape=", ".join(f"{key.replace('_', ' ')} {value}" for key, value in shape.items()),
            vocabulary=len(tokenizer),
            context=CONTEXT,
            python=platform.python_version(),
            characters=f"{counts['characters'] / 1e6:.0f} million characters",
            counts=", ".join(f"{value} files {key}" for key, value in counts.items() if key != "characters"),
            steps=state["steps"],
            remark=" " + remarks[name] if name in remarks else "",
            figures=rows,
            draft=" --draft tokenry/code-draft" if name == "code" else " --draft none",
            machine=found["machine"].get("cpu", "a CPU"),
        )
        folder = tokenry.path(f"tokenry/{name}")
        (folder / "README.md").write_text(text)
        (folder / "figures.json").write_text(json.dumps(found, indent=1) + "\n")
        print(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("corpus", "train", "export", "card"))
    parser.add_argument("name", nargs="?", choices=tuple(SHAPES), default="code")
    parser.add_argument("--work", type=Path, default=Path(".recipe"))
    parser.add_argument("--steps", type=int, default=3600, help="optimizer steps of 8,192 tokens")
    parser.add_argument("--blocks", type=int, default=4000, help="token blocks written by the corpus step")
    parser.add_argument("--seed", type=int, default=0, help="seed of the order of the documents")
    parser.add_argument("--copying", type=int, default=600, help="the block where a hundred blocks teach copying")
    parser.add_argument("--mixture", choices=("source", "examples"), default="source", help="what the blocks hold")
    parser.add_argument("--tokenizer", choices=("bpe", "unigram"), default="bpe", help="kind of the tokenizer")
    parser.add_argument("--vocabulary", type=int, default=4096, help="ids of the tokenizer")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--start", help="model to go on from (a folder, or tokenry/code) instead of random weights")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    if options.step == "corpus":
        plan = (options.blocks, options.seed, options.copying, options.mixture)
        corpus(options.work, *plan, options.tokenizer, options.vocabulary)
    elif options.step == "train":
        train(options.work, options.name, options.steps, options.lr, options.start)
    elif options.step == "export":
        export(options.work)
    else:
        card(options.work)


if __name__ == "__main__":
    main()
