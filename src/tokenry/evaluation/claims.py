"""What the papers claim, on what, and why figures measured elsewhere can differ: the text of docs/results.

It holds no figure of our own: those come from the JSON of the runs.
"""

from dataclasses import dataclass

_PASSES = (
    "On a large GPU a verify pass over dozens of tokens takes about as long as one over a single token, so tokens per "
    "pass become speed. On a CPU, and for a small model, every drafted token costs; there, tokens per pass carry over "
    "and the ratio of speeds does not."
)
_SMALL = (
    "A model of a few million parameters knows little beyond its training text: it repeats itself more, is less sure "
    "of what follows and solves few tasks, which moves acceptance and quality either way."
)
_TRAINED = "The weights it needs are trained here in minutes on a small corpus, in the paper for days on large ones."
_LONG = (
    "The paper's gain is at prompts of many thousands of tokens, where the cache decides time and memory; at the "
    "lengths here it is a small part of both."
)
_GPU_MEMORY = (
    "Its speed comes from fewer bytes moved on a GPU, or to it; where nothing is moved, only the bytes can show it."
)


@dataclass(frozen=True)
class Claim:
    """A paper's headline: what it claims, on which models and hardware, and why other figures can come out here."""

    claim: str
    setting: str
    why: str


CLAIMS: dict[str, Claim] = {
    # speculation
    "token-recycling": Claim(
        "About twice the speed with less than 2 MB of storage: 2.03 times on Spec-Bench at 2.70 tokens a step, and "
        "2.34 times at 2.93 on MBPP; 30% faster than the best drafter without training before it and 25% than Medusa.",
        "Vicuna 7B and Code Llama 7B in float16, greedy, one prompt at a time, an A100 of 80 GB.",
        f"{_PASSES} The table starts empty in each call here, and texts are shorter, so less is learned.",
    ),
    "prompt-lookup": Claim(
        "On Spec-Bench 1.53 times the speed at 1.75 tokens a step.",
        "Vicuna 7B on an A100, as the Token Recycling paper has it.",
        f"{_PASSES} How much of an output is copied depends on the task and the model.",
    ),
    "dyspec": Claim(
        "Up to 9.1 times the throughput of plain decoding with an offloaded 70B target. With a 68M draft for a 7B "
        "target and 64 nodes on C4: 3.15 times at 5.25 tokens a step, against 2.64 at 4.99 for Sequoia's fixed tree "
        "and 1.79 at 3.32 for SpecInfer's; at temperature 0.6 2.20, 1.85 and 1.80 times.",
        "Llama 2 7B and 70B with Llama drafts of 68M and 7B, prompts and outputs of 128 tokens, an A100 of 40 GB; "
        "draft temperature 0.6.",
        f"{_PASSES} Growing the tree node by node costs one draft pass a node, which pays only where the target is "
        "far slower than the draft.",
    ),
    "goose": Claim(
        "1.9 to 4.3 times the speed of plain decoding; 12% to 33% more tokens a step than balanced trees of the same "
        "number of nodes, and never fewer than either of its two sources alone.",
        "Five models of 7B to 33B (Vicuna, Llama 3, Qwen 3) in float16 on HumanEval, MBPP, ClassEval, GSM8K and "
        "MT-Bench, greedy, one prompt at a time, 512 new tokens, A40 and A100 GPUs.",
        f"{_PASSES} Its spine needs text that repeats; at short outputs there is less of it.",
    ),
    "gated-lora-mtp": Claim(
        "Nearly 5 times fewer steps on code and mathematics (5.35 at best) and about 2.5 on chat and knowledge, with "
        "outputs of the same quality.",
        "Tulu 3 8B fine-tuned with 8 mask tokens. The figure is tokens a step; the cost of the extra rows of a step "
        "is not in it.",
        f"{_TRAINED} {_PASSES}",
    ),
    "hamburger": Claim(
        "Up to half the growth of the cache and up to twice the tokens a second at the same quality: 1.65 times on "
        "GSM8K, 2.20 on HumanEval, 1.71 on MGSM, 1.52 on Multi-News.",
        "Llama 3.2 1B Instruct, fine-tuned, in a compiled loop (gpt-fast).",
        f"{_TRAINED} It changes what is generated, so its quality must be read beside its speed.",
    ),
    "future-token-prediction": Claim(
        "One state vector for each position carries the text ahead: vectors change smoothly along a text, keep the "
        "topic better than a GPT of equal perplexity, and a toy programming task is solved markedly better. The "
        "abstract gives no figures and claims no speed.",
        "Models of GPT-2's size, pre-trained from scratch.",
        f"{_TRAINED} Drafting with the vectors is measured here; the paper leaves that open.",
    ),
    "adaspec": Claim(
        "A higher acceptance rate than DistillSpec on all five tasks, by up to 15 points (MBPP: 49.9% to 65.1%).",
        "Pythia 31M drafting for Pythia 1.4B, and CodeGen for Phi-2; GSM8K, Alpaca, MBPP, CNN/DailyMail, XSum.",
        f"{_TRAINED} Leaving tokens out helps where the draft is too small to learn them all within the training.",
    ),
    "any-subset-speculative-decoding": Claim(
        "Samples from the true joint distribution with at most one pass a token: 434 instead of 486 passes and 16.5 "
        "instead of 18.2 seconds, at equal perplexity.",
        "A fine-tuned XLNet of 110M on WikiText with 95% of the tokens masked, 5 drafts a pass, one GPU.",
        f"{_TRAINED} {_SMALL}",
    ),
    # decoding
    "parallel-generation-survey": Claim(
        "A taxonomy: three families of parallel generation that remain autoregressive and three that do not, with what "
        "each trades among speed, quality and resources. It claims no figures of its own.",
        "The published papers of all families.",
        "Nothing is claimed that could differ; the recommendation is of one model, text and machine.",
    ),
    "cntp": Claim(
        "Better than greedy decoding and plain sampling by a clear margin: GSM8K 81.6 (sampled 79.4, greedy 79.8), "
        "MATH 47.1 (41.5 and 41.5), StrategyQA 73.2 (72.0 and 72.9).",
        "Llama 3.1 8B Instruct, five seeds, temperatures 0.6 to 1.2, one prompt at a time.",
        f"{_SMALL} Choosing the likeliest of several trials helps where the model's own likelihood tells right from "
        "wrong.",
    ),
    "exact-byte-probabilities": Claim(
        "About 18 points better on fill-in-the-middle code whose prompt stops inside a token, never below token "
        "healing; byte-level ensembles of models with different vocabularies gain up to 3.7%.",
        "A code model of about 7 billion parameters on HumanEval infilling; the exactness itself is a theorem and is "
        "tested.",
        _SMALL,
    ),
    "in-context-navigation": Claim(
        "Likeliest next tokens are mostly right and those in the middle resemble the top ones; listing the answers "
        "found so far brings new correct ones. The abstract gives no figures.",
        "Models of 7 and 8 billion parameters, Llama 3 8B and OLMo 7B among them.",
        f"{_SMALL} It relies on a model that follows such a list.",
    ),
    "r2r": Claim(
        "At 5.6B activated parameters a token 1.6 times the accuracy of a 7B and 1.1 times that of a 14B model, and "
        "2.8 times the speed of the 32B model at comparable quality.",
        "DeepSeek R1 distilled into Qwen 1.5B and 32B; AIME, GPQA-Diamond and LiveCodeBench.",
        f"{_TRAINED} The two models here differ far less in size and skill.",
    ),
    "skipdecode": Claim(
        "2 to 5 times faster with negligible loss, in batches and with a cache.",
        "OPT 1.3B and 6.7B, fine-tuned; E2E, Reddit TL;DR and CNN/DailyMail. The speed-up is counted in layers.",
        f"{_TRAINED} A model of a few layers has few to skip.",
    ),
    "superposed-decoding": Claim(
        "k drafts for about one pass, as coherent as nucleus sampling and as factual as greedy decoding, at least "
        "2.44 times faster from three drafts on and 3.54 times at eight.",
        "Llama 2 7B with n-gram tables of a large corpus.",
        f"{_SMALL} The n-gram tables here are small.",
    ),
    # kvcache
    "h2o": Claim(
        "With a fifth of the cache up to 29 times the throughput of two serving systems and 3 times that of FlexGen, "
        "up to 1.9 times lower latency at the same batch size, and little loss of accuracy.",
        "OPT 6.7B and 30B, LLaMA and GPT-NeoX 20B, where a smaller cache allows larger batches on one GPU.",
        f"{_LONG} Without attention scores from a fused kernel, computing them costs time here.",
    ),
    "dapq": Claim(
        "99.5% of needle-in-a-haystack with 3% of the cache; better than SnapKV, PyramidKV, H2O and StreamingLLM at "
        "tight budgets on five benchmarks, at no cost that could be measured.",
        "Llama 3 and 3.1 8B, Qwen 2.5 7B, Qwen 3 8B.",
        f"{_LONG} {_SMALL}",
    ),
    "fasa": Claim(
        "Nearly all of the full cache's quality on LongBench with 256 tokens attended to, and 2.56 times the speed "
        "with 18.9% of the cache.",
        "Models of 3B to 8B with rotary positions (Llama 3, Qwen 2.5, Mistral) on a GPU.",
        f"{_GPU_MEMORY} {_LONG}",
    ),
    "fastkv": Claim(
        "Prefill up to 1.82 and decoding up to 2.87 times faster at 128 thousand tokens; LongBench 49.07 with 20% of "
        "the cache (full 50.19, SnapKV 49.43).",
        "Llama 3.1 8B Instruct on an A100.",
        f"{_LONG} A model of few layers has few behind the layer that prunes.",
    ),
    "icecache": Claim(
        "99% of the full cache's accuracy on LongBench with 256 tokens on the GPU; as good as other offloading "
        "methods with a quarter of their tokens.",
        "Llama 3.1 8B Instruct, cache in the CPU's memory, one GPU.",
        f"{_GPU_MEMORY} {_SMALL}",
    ),
    "keyformer": Claim(
        "With half the cache 2.1 times lower latency and 2.4 times the token throughput at kept accuracy.",
        "GPT-J 6B, Cerebras-GPT 6.7B and MPT 7B; summarisation and conversation, one GPU.",
        f"{_GPU_MEMORY} {_LONG}",
    ),
    "kv-prediction": Claim(
        "15% to 50% more accuracy than baselines at equal work before the first token; TriviaQA 16.09 at 2.36 times "
        "less work, against 10.97 for the small model alone and 23.57 for the large one.",
        "OpenELM 1.1B with an auxiliary model of 450M, trained on about 140 billion tokens; an M2 Pro CPU.",
        _TRAINED,
    ),
    "lazyllm": Claim(
        "The first token 2.34 times sooner for at most 1% of loss on multi-document questions; generation as a whole "
        "1.01 to 1.79 times faster.",
        "Llama 2 7B on LongBench, A100; XGen 7B up to 3.16 times as a whole.",
        f"{_LONG} A model of few layers has few to prune in.",
    ),
    "sentencekv": Claim(
        "Better than SnapKV, Quest, InfLLM and ShadowKV at 1,024 tokens in memory and speed without loss of accuracy, "
        "with a latency that stays flat at very long contexts.",
        "Llama 3.1 8B Instruct on PG-19, LongBench and needle-in-a-haystack; cache in the CPU's memory.",
        f"{_GPU_MEMORY} {_LONG}",
    ),
    "spatten": Claim(
        "Ten times less memory traffic on 30 benchmarks without loss, and 1.6 to 347 times the speed of other "
        "accelerators, a GPU and a CPU.",
        "BERT and GPT-2 on hardware of the authors' own design, simulated.",
        "The rule of pruning is measured here on ordinary hardware, which reads whole tensors whatever is pruned.",
    ),
    "treekv": Claim(
        "The best perplexity of the compared caches on PG-19 and OpenWebText2 with a cache 16 times smaller, and the "
        "best score on LongBench at 6% of the budget.",
        "Llama 2 7B, far beyond the length it was trained at.",
        f"{_LONG} {_SMALL}",
    ),
}
