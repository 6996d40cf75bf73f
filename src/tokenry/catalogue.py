"""The index of all methods: what each is, which paper it comes from, where its class lives.

It imports nothing heavy, so that listing methods is instant. A row without a target is a paper
whose method is not available yet; it stands here so that what is missing is always in sight.
"""

from dataclasses import dataclass
from typing import Any, Literal

FAMILIES = {
    "generation": "the plain loop",
    "tokenization": "how text becomes tokens",
    "decoding": "which token comes next",
    "speculation": "several tokens a step",
    "kvcache": "which past tokens stay",
    "diffusion": "tokens in any order",
    "training": "which tokens teach",
    "attribution": "which tokens mattered",
    "vision": "which image tokens stay",
    "images": "how pictures become tokens, and tokens pictures",
    "recommendation": "items as tokens",
    "knowledge": "facts from tokens",
    "peers": "other libraries, measured in the same run",
}


@dataclass(frozen=True)
class Paper:
    """A publication: title, arXiv id, year of first version, and the authors' code on GitHub."""

    title: str
    arxiv: str | None
    year: int
    code: str | None = None  # "owner/name"; None where the authors published none

    def __str__(self) -> str:
        parts = [self.title, f"arXiv {self.arxiv}" if self.arxiv else "", str(self.year)]
        return ", ".join(part for part in parts if part)


@dataclass(frozen=True)
class Row:
    """One method of the catalogue.

    `target` is "module:Class", None where the method is not available yet. `kind` tells the 73
    papers from the baselines they are compared with and from other libraries' methods. `needs`
    names what a user must have besides a model; `cost` says what a use costs.
    """

    slug: str
    family: str
    target: str | None
    paper: Paper | None
    needs: tuple[str, ...]
    cost: str
    summary: str
    kind: Literal["paper", "baseline", "peer", "external"] = "paper"

    @property
    def available(self) -> bool:
        """Whether the method can be used."""
        return self.target is not None


WAYS = {
    "one-by-one": "one token a call of the model",
    "draft-and-verify": "tokens are drafted, one call checks them all",
    "multiple-token-prediction": "one call predicts several tokens",
    "masked": "masked places are predicted at once, some are kept, until none is left",
    "several-texts": "several texts for each prompt",
    "choice": "one token a call, chosen otherwise",
    "model-size": "a smaller model writes most tokens",
    "depth": "fewer layers for most tokens",
    "memory": "fewer cached tokens",
    "control": "the floor or the ceiling that others are compared with",
}
"""How a method's tokens come: of the families of parallel generation in arXiv 2508.08712 those that have a method here
(decomposition-and-fill, one-shot and edit-based have none), and their neighbours, which save something else."""

EXACTNESS = {
    "distribution": "greedy output and sampled distribution are those of plain decoding",
    "greedy": "greedy output is that of plain decoding",
    "approximate": "the output is another one",
    "other": "the model is of another class, so that there is no plain output to compare with",
}

TRAINING = {
    "none": "nothing is trained",
    "table": "a table is counted, no weights are trained",
    "heads": "weights beside the model are trained, its own stay",
    "fine-tuning": "the model, or a copy of it, is fine-tuned",
    "pre-training": "a model is trained for it from scratch",
}

CACHE = {
    "append": "grows by each token",
    "crop": "grows by each draft, and is cut back",
    "tree": "holds the branches of a draft until one is kept",
    "branch": "is copied for several texts",
    "partial": "lacks tokens in some layers or in one of two models",
    "budget": "holds only some tokens",
    "none": "is not used",
}
"""What a method asks of the key-value cache."""


@dataclass(frozen=True, kw_only=True)
class Traits:
    """Where a way to generate stands in the taxonomy of parallel generation (arXiv 2508.08712) and its neighbours.

    `way`, `exactness`, `training` and `cache` are keys of `WAYS`, `EXACTNESS`, `TRAINING` and `CACHE`. `second_model`
    tells whether a model runs beside, `batches` whether several prompts run together, `samples` whether it can sample.
    """

    way: str
    exactness: Literal["distribution", "greedy", "approximate", "other"]
    training: Literal["none", "table", "heads", "fine-tuning", "pre-training"] = "none"
    second_model: bool = False
    batches: bool = True
    samples: bool = True
    cache: str = "append"


# fmt: off
ROWS: tuple[Row, ...] = (
    # generation
    Row("plain", "generation", "tokenry.generation.plain:Plain", None,
        ("training-free",), "one forward pass a token",
        "One token a step, as transformers' own greedy search and sampling choose it.", "baseline"),

    # tokenization
    Row("byte2word", "tokenization", None,
        Paper("Word-Level Representation From Bytes For Language Modeling", "2211.12677", 2022),
        ("pre-training",), "embedding table a tenth of the size",
        "Build each word's vector from its bytes by one small cross-attention."),
    Row("dynamic-tokenization", "tokenization", None,
        Paper("Retrofitting (Large) Language Models with Dynamic Tokenization", "2411.18553", 2024,
              "DariusFeher/dynamic-tokenization"),
        ("embedding predictor",), "shorter sequences for one prediction a new token",
        "Merge frequent neighbours of the current batch and predict embeddings for the merged tokens."),
    Row("k-tokeniser", "tokenization", None,
        Paper("Infusing clinical knowledge into tokenisers for language models", "2406.14312", 2024,
              "abulhasanbbk/K-Tokenizer"),
        ("domain concepts", "fine-tuning"), "a fine-tuning run",
        "Split domain words by the statistics of domain concepts, chosen per word and sentence."),
    Row("kl3m-tokenizers", "tokenization", None,
        Paper("KL3M Tokenizers: A Family of Domain-Specific and Character-Level Tokenizers for Legal, "
              "Financial, and Preprocessing Applications", "2503.17247", 2025,
              "alea-institute/kl3m-tokenizers"),
        ("domain text",), "minutes of tokenizer training",
        "Train BPE tokenizers with curated whole-unit tokens, and character ones for text correction."),
    Row("learn-your-tokens", "tokenization", None,
        Paper("Learn Your Tokens: Word-Pooled Tokenization for Language Modeling", "2310.11628", 2023,
              "avi-jit/eTok"),
        ("pre-training",), "a training run from scratch",
        "Pool each word's bytes into a few vectors, model words, and spell all next words in parallel."),
    Row("qtok", "tokenization", None,
        Paper("Qtok: A Comprehensive Framework for Evaluating Multilingual Tokenizer Quality in Large "
              "Language Models", "2410.12989", 2024, "nup-csai/Qtok"),
        ("training-free",), "seconds a vocabulary",
        "Tabulate a vocabulary: token classes, scripts and languages served, broken bytes."),
    Row("tokenadapt", "tokenization", None,
        Paper("Achieving Tokenizer Flexibility in Language Models through Heuristic Adaptation and "
              "Supertoken Learning", "2505.09738", 2025, "Tinycompany-AI/tokenadapt"),
        ("training-free", "new tokenizer"), "one pass over the new vocabulary",
        "Give a model another tokenizer by mixing sub-token composition with nearest old tokens."),
    Row("tokenization-consistency", "tokenization", None,
        Paper("Say Anything but This: When Tokenizer Betrays Reasoning in LLMs", "2601.14658", 2026),
        ("training-free",), "one generation a probe",
        "Measure and block edits that change token ids while the text stays the same."),
    Row("tokenization-theory", "tokenization", None,
        Paper("Toward a Theory of Tokenization in LLMs", "2404.08335", 2024),
        ("pre-training",), "small training runs",
        "Measure how much modelling a tokenizer takes over, on Markov sources with a known optimum."),
    Row("zett", "tokenization", None,
        Paper("Zero-Shot Tokenizer Transfer", "2405.07883", 2024, "bminixhofer/zett"),
        ("trained hypernetwork", "new tokenizer"), "one pass over the new vocabulary",
        "Predict a new tokenizer's embeddings with a hypernetwork that reads its vocabulary."),

    # decoding
    Row("cntp", "decoding", "tokenry.decoding.cntp:CNTP",
        Paper("Cautious Next Token Prediction", "2507.03038", 2025, "wyzjack/CNTP"),
        ("training-free",), "up to 10 trials where the entropy is high",
        "Where entropy is high, sample several continuations up to a punctuation mark and keep the "
        "likeliest."),
    Row("exact-byte-probabilities", "decoding", "tokenry.decoding.byte_view.decoder:ExactByteProbabilities",
        Paper("Exact Byte-Level Probabilities from Tokenized Language Models for FIM-Tasks and Model "
              "Ensembles", "2410.09303", 2024,
              "facebookresearch/Exact-Byte-Level-Probabilities-from-Tokenized-LMs"),
        ("training-free",), "a few forward passes a token",
        "Turn a tokenized model into an exact next-byte predictor."),
    Row("in-context-navigation", "decoding",
        "tokenry.decoding.in_context_navigation.decoder:InContextNavigation",
        Paper("Correlation and Navigation in the Vocabulary Key Representation Space of Language Models",
              "2410.02284", 2024, "KomeijiForce/KeyNavi"),
        ("training-free",), "a longer prompt a round",
        "List the answers already found in the prompt, so that the model reaches new correct ones."),
    Row("parallel-generation-survey", "decoding", "tokenry.evaluation.choose:Chooser",
        Paper("A Survey on Parallel Text Generation: From Parallel Decoding to Diffusion Language Models",
              "2508.08712", 2025),
        ("training-free",), "measures the candidates once",
        "Map the families that emit several tokens a call, and choose one for a model and workload: "
        "`tokenry choose`."),
    Row("r2r", "decoding", "tokenry.decoding.r2r.decoder:R2R",
        Paper("R2R: Efficiently Navigating Divergent Reasoning Paths with Small-Large Model Token Routing",
              "2505.21600", 2025, "thu-nics/R2R"),
        ("second model", "trained router"), "a large-model pass on routed tokens only",
        "Let a small model write and a router send the tokens that change the path to a large one."),
    Row("skipdecode", "decoding", "tokenry.decoding.skipdecode.decoder:SkipDecode",
        Paper("SkipDecode: Autoregressive Skip Decoding with Batching and Caching for Efficient LLM "
              "Inference", "2307.02628", 2023),
        ("fine-tuning",), "fewer layers for later tokens",
        "Give each position a shrinking layer budget, so that early exit works with batches and caches."),
    Row("superposed-decoding", "decoding", "tokenry.decoding.superposed.decoder:Superposed",
        Paper("Superposed Decoding: Multiple Generations from a Single Autoregressive Inference Pass",
              "2405.18400", 2024, "RAIVNLab/SuperposedDecoding"),
        ("n-gram table",), "k drafts for one pass",
        "Write k drafts in one pass by feeding a mixture of their last token embeddings."),

    # speculation
    Row("adaspec", "speculation", "tokenry.speculation.adaspec:AdaSpecTrainer",
        Paper("AdaSPEC: Selective Knowledge Distillation for Efficient Speculative Decoders",
              "2510.19779", 2025, "yuezhouhu/adaspec"),
        ("draft model", "distillation"), "a distillation run",
        "Distil a draft model only on the tokens it can still learn."),
    Row("any-subset-speculative-decoding", "speculation", "tokenry.speculation.any_subset.sampler:AnySubset",
        Paper("Reviving Any-Subset Autoregressive Models with Principled Parallel Sampling and Speculative "
              "Decoding", "2504.20456", 2025, "gabeguo/any-order-speculative-decoding"),
        ("any-order model",), "at most one pass a token",
        "Fill masked positions in parallel, exactly, with a model that drafts for itself."),
    Row("dyspec", "speculation", "tokenry.speculation.dyspec:DySpec",
        Paper("DySpec: Faster Speculative Decoding with Dynamic Token Tree Structure", "2410.11744", 2024),
        ("draft model",), "draft passes for a wider verify pass",
        "Grow the draft tree at run time where the draft model is confident."),
    Row("future-token-prediction", "speculation",
        "tokenry.speculation.future_token_prediction.drafter:FutureTokenPrediction",
        Paper("Future Token Prediction - Causal Language Modelling with Per-Token Semantic State Vector for "
              "Multi-Token Prediction", "2410.18160", 2024),
        ("pre-training",), "a training run; then wider verify passes",
        "Train one state vector per position to decode the next N tokens, and draft with it."),
    Row("gated-lora-mtp", "speculation", "tokenry.speculation.gated_lora_mtp.drafter:GatedLoRAMTP",
        Paper("Your LLM Knows the Future: Uncovering Its Multi-Token Prediction Potential",
              "2507.11851", 2025),
        ("fine-tuning",), "a LoRA run; then wider verify passes",
        "Make a frozen model draft its own future through mask tokens and gated LoRA."),
    Row("goose", "speculation", "tokenry.speculation.goose:Goose",
        Paper("Goose: Anisotropic Speculation Trees for Training-Free Speculative Decoding",
              "2604.02047", 2026, "2kinto/GOOSE_Speculative_Decoding"),
        ("training-free",), "a wider verify pass a step",
        "Draft a deep spine of copied text with wide branches of recycled candidates."),
    Row("hamburger", "speculation", "tokenry.speculation.hamburger.decoding:Hamburger",
        Paper("HAMburger: Accelerating LLM Inference via Token Smashing", "2505.20438", 2025,
              "Jingyu6/hamburger"),
        ("fine-tuning",), "a training run; then fewer base-model steps",
        "Fuse several output tokens into one cache entry and emit several a base-model step."),
    Row("token-recycling", "speculation", "tokenry.speculation.token_recycling:TokenRecycling",
        Paper("Turning Trash into Treasure: Accelerating Inference of Large Language Models with Token "
              "Recycling", "2408.08696", 2024, "Luowaterbi/TokenRecycling"),
        ("training-free",), "an 81-token verify pass a step",
        "Draft a tree from the top candidates that earlier steps computed and threw away."),
    Row("draft-model", "speculation", "tokenry.speculation.draft_model:DraftModel",
        Paper("Fast Inference from Transformers via Speculative Decoding", "2211.17192", 2022),
        ("draft model",), "draft passes for a wider verify pass",
        "Draft a chain of tokens with a small model of the same tokenizer.", "baseline"),
    Row("draft-tree", "speculation", "tokenry.speculation.draft_tree:FixedDraftTree",
        Paper("SpecInfer: Accelerating Generative Large Language Model Serving with Tree-based Speculative "
              "Inference and Verification", "2305.09781", 2023, "flexflow/FlexFlow"),
        ("draft model",), "a draft pass a level for a wider verify pass",
        "Draft a tree of fixed shape with a small model of the same tokenizer.", "baseline"),
    Row("prompt-lookup", "speculation", "tokenry.speculation.prompt_lookup:PromptLookup",
        Paper("Prompt Lookup Decoding", None, 2023, "apoorvumang/prompt-lookup-decoding"),
        ("training-free",), "a wider verify pass where text repeats",
        "Draft what followed the last few tokens when they occurred before.", "baseline"),
    Row("self-draft", "speculation", "tokenry.speculation.self_draft:SelfDraft",
        Paper("TriForce: Lossless Acceleration of Long Sequence Generation with Hierarchical Speculative Decoding",
              "2404.11912", 2024, "Infini-AI-Lab/TriForce"),
        ("training-free",), "a second prefill, a pass a draft behind a small cache",
        "Draft a chain with the model itself behind a budgeted cache, verified by its full cache.", "baseline"),
    Row("suffix", "speculation", "tokenry.speculation.suffix:Suffix",
        Paper("SuffixDecoding: Extreme Speculative Decoding for Emerging AI Applications", "2411.04975", 2024,
              "snowflakedb/ArcticInference"),
        ("training-free",), "a wider verify pass where text repeats",
        "Draft what followed the longest suffix of the text that occurred before.", "baseline"),

    # kvcache
    Row("dapq", "kvcache", "tokenry.kvcache.dapq:DapQ",
        Paper("Where Matters More Than What: Decoding-aligned KV Cache Compression via Position-aware "
              "Pseudo Queries", "2603.11564", 2026),
        ("training-free",), "32 extra prompt tokens; bounded cache",
        "Keep the prompt tokens that pseudo queries at the positions of decoding attend to."),
    Row("fasa", "kvcache", "tokenry.kvcache.fasa:FASA",
        Paper("FASA: Frequency-aware Sparse Attention", "2602.03152", 2026, "AMAP-ML/FASA-ICLR2026"),
        ("calibration",), "a cheap score a step; the whole cache stays",
        "Attend to the tokens that a few rotary frequency planes of each head select."),
    Row("fastkv", "kvcache", "tokenry.kvcache.fastkv:FastKV",
        Paper("FastKV: Decoupling of Context Reduction and KV Cache Compression for Prefill-Decoding "
              "Acceleration", "2502.01068", 2025, "dongwonjo/FastKV"),
        ("training-free",), "half the layers see a short prompt",
        "Run the first layers on the whole prompt and pass only salient tokens to the rest."),
    Row("h2o", "kvcache", "tokenry.kvcache.h2o:H2O",
        Paper("H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models",
              "2306.14048", 2023, "FMInference/H2O"),
        ("training-free",), "attention scores a step; bounded cache",
        "Keep the newest tokens and the heavy hitters, those with the most accumulated attention."),
    Row("icecache", "kvcache", "tokenry.kvcache.icecache:IceCache",
        Paper("IceCache: Memory-efficient KV-cache Management for Long-Sequence LLMs", "2604.10539", 2026,
              "yuzhenmao/M-DCI"),
        ("training-free",), "an index on the CPU; the whole cache stays there",
        "Keep pages of similar tokens on the CPU and fetch those a query needs by a dynamic index."),
    Row("keyformer", "kvcache", "tokenry.kvcache.keyformer:Keyformer",
        Paper("Keyformer: KV Cache Reduction through Key Tokens Selection for Efficient Generative "
              "Inference", "2403.09054", 2024, "d-matrix-ai/keyformer-llm"),
        ("training-free",), "attention logits a step; bounded cache",
        "Keep the newest tokens and key tokens chosen by a Gumbel-noised, annealed score."),
    Row("kv-prediction", "kvcache", "tokenry.kvcache.kv_prediction.policy:KVPrediction",
        Paper("KV Prediction for Improved Time to First Token", "2410.08391", 2024, "apple/corenet"),
        ("second model", "training"), "a training run; then a cheap prefill",
        "Let a small model read the prompt and predict the large model's cache."),
    Row("lazyllm", "kvcache", "tokenry.kvcache.lazyllm:LazyLLM",
        Paper("LazyLLM: Dynamic Token Pruning for Efficient Long Context LLM Inference", "2407.14057", 2024),
        ("training-free",), "less prefill; hidden states kept for revival",
        "Compute a prompt token in a layer only when the next token needs it."),
    Row("sentencekv", "kvcache", "tokenry.kvcache.sentencekv:SentenceKV",
        Paper("SentenceKV: Efficient LLM Inference via Sentence-Level Semantic KV Caching",
              "2504.00970", 2025, "zzbright1998/SentenceKV"),
        ("training-free",), "one score a sentence; the whole cache stays",
        "Retrieve whole sentences at each step, each summarised by its mean key."),
    Row("spatten", "kvcache", "tokenry.kvcache.spatten:SpAtten",
        Paper("SpAtten: Efficient Sparse Attention Architecture with Cascade Token and Head Pruning",
              "2012.09852", 2021, "mit-han-lab/spatten"),
        ("training-free",), "attention scores a layer",
        "Prune tokens and heads layer by layer by the attention they accumulate."),
    Row("treekv", "kvcache", "tokenry.kvcache.treekv:TreeKV",
        Paper("TreeKV: Smooth Key-Value Cache Compression with Tree Structures", "2501.04987", 2025),
        ("training-free",), "attention scores a step; bounded cache",
        "Keep a cache whose density falls off smoothly from near to far context."),
    Row("sinks", "kvcache", "tokenry.kvcache.sinks:Sinks",
        Paper("Efficient Streaming Language Models with Attention Sinks", "2309.17453", 2023,
              "mit-han-lab/streaming-llm"),
        ("training-free",), "no scores; bounded cache",
        "Keep the first few tokens and the newest ones.", "baseline"),
    Row("random", "kvcache", "tokenry.kvcache.random:Random", None,
        ("training-free",), "no scores; bounded cache",
        "Keep tokens at random: the floor that a policy must beat.", "baseline"),
    Row("snapkv", "kvcache", "tokenry.kvcache.snapkv:SnapKV",
        Paper("SnapKV: LLM Knows What You are Looking for Before Generation", "2404.14469", 2024,
              "FasterDecoding/SnapKV"),
        ("training-free",), "attention scores of the newest tokens; bounded cache",
        "Keep the newest tokens and those that the prompt's last tokens attend to.", "baseline"),
    Row("keydiff", "kvcache", "tokenry.kvcache.keydiff:KeyDiff",
        Paper("KeyDiff: Key Similarity-Based KV Cache Eviction for Long-Context LLM Inference in Resource-Constrained "
              "Environments", "2504.15364", 2025),
        ("training-free",), "key similarity; bounded cache",
        "Keep the tokens whose keys differ most from the others.", "baseline"),
    Row("oracle", "kvcache", "tokenry.kvcache.oracle:Oracle", None,
        ("training-free",), "full attention a step",
        "Attend to the tokens with the most attention at each step: the ceiling.", "baseline"),

    # diffusion
    Row("learn2pd", "diffusion", None,
        Paper("Learning to Parallel: Accelerating Diffusion Large Language Models via Adaptive Parallel "
              "Decoding", "2509.25188", 2025, "ims-kdks/Learning-to-Parallel-Decoding"),
        ("diffusion language model", "trained filter"), "minutes of filter training",
        "Let a tiny filter decide which predicted tokens are final, and cut at the end of text."),
    Row("orthogonal-diverse-diffusion", "diffusion", None,
        Paper("Free Lunch for Pass@k? Low Cost Diverse Sampling for Diffusion Language Models",
              "2603.04893", 2026, "sean-lamont/odd"),
        ("diffusion language model", "training-free"), "about 5% more time a batch",
        "Make the samples of one batch differ from each other."),
    Row("window-diffusion", "diffusion", None,
        Paper("Window-Diffusion: Accelerating Diffusion Language Model Inference with Windowed Token "
              "Pruning and Caching", "2601.20332", 2026, "vhicrgit/Window-Diffusion"),
        ("diffusion language model", "training-free"), "a few active tokens a step",
        "Decode inside a window that slides to the right and leave far masks out."),

    # training
    Row("caft", "training", None,
        Paper("Improving large language models with concept-aware fine-tuning", "2506.07833", 2025,
              "michaelchen-lab/caft-llm"),
        ("fine-tuning",), "auxiliary heads during training",
        "Fine-tune with a small multi-token loss through throw-away heads."),
    Row("electra", "training", None,
        Paper("ELECTRA: Pre-training Text Encoders as Discriminators Rather Than Generators",
              "2003.10555", 2020, "google-research/electra"),
        ("pre-training",), "a small generator beside the encoder",
        "Pre-train an encoder by telling real tokens from plausible fakes."),
    Row("mlm-u", "training", None,
        Paper("Transformers Can Navigate Mazes With Multi-Step Prediction", "2412.05117", 2024,
              "facebookresearch/maze_navigation_MLMU"),
        ("pre-training",), "a training run from scratch",
        "Train on answers masked at a uniformly random rate, to predict many steps ahead."),
    Row("prior", "training", None,
        Paper("Prioritizing Image-Related Tokens Enhances Vision-Language Pre-Training",
              "2505.08971", 2025),
        ("vision-language model", "reference model"), "one reference pass a batch",
        "Weight each caption token by how badly a text-only model predicts it."),
    Row("refine", "training", None,
        Paper("Reinforced Fast Weights with Next-Sequence Prediction", "2602.16704", 2026,
              "princetonvisualai/ReFINE"),
        ("fine-tuning",), "short rollouts a step",
        "Reward short rollouts for landing near the true continuation."),
    Row("self-improving-pretraining", "training", None,
        Paper("Self-Improving Pretraining: using post-trained models to pretrain better models",
              "2601.21343", 2026),
        ("pre-training", "judge model"), "rollouts and judgements a step",
        "Pre-train on the best of original, rewritten and sampled continuations."),
    Row("sstoken", "training", None,
        Paper("ssToken: Self-modulated and Semantic-aware Token Selection for LLM Fine-tuning",
              "2510.18250", 2025, "jianke0604/ssToken"),
        ("fine-tuning",), "one pass of the earlier model a batch",
        "Fine-tune on the useful 60% of response tokens, chosen on the fly."),
    Row("text2token", "training", None,
        Paper("Text2Token: Unsupervised Text Representation Learning with Token Target Prediction",
              "2510.10224", 2025),
        ("fine-tuning",), "a fine-tuning run",
        "Train a text embedder by making the pooled vector predict the text's key tokens."),
    Row("whos-harry-potter", "training", None,
        Paper("Who's Harry Potter? Approximate Unlearning in LLMs", "2310.02238", 2023),
        ("fine-tuning",), "two fine-tuning runs",
        "Unlearn a text by fine-tuning on what a model that never read it would say."),

    # attribution
    Row("frugalprompt", "attribution", None,
        Paper("FrugalPrompt: Reducing Contextual Overhead in Large Language Models via Token Attribution",
              "2510.16439", 2025, "Starscream-11813/Frugal-ICL"),
        ("scoring encoder",), "one encoder pass a prompt",
        "Shorten a prompt to its most salient tokens."),
    Row("magic-words", "attribution", None,
        Paper("What's the Magic Word? A Control Theory of LLM Prompting", "2310.04444", 2023,
              "amanb2000/Magic_Words"),
        ("training-free",), "many forward passes a search",
        "Search the short prompt that steers a model to a wanted token, and measure how far it can."),
    Row("reagent", "attribution", None,
        Paper("ReAGent: A Model-agnostic Feature Attribution Method for Generative Language Models",
              "2402.00794", 2024, "casszhao/ReAGent"),
        ("training-free",), "tens to hundreds of forward passes a token",
        "Find which input tokens made the model write a token, by replacing them."),

    # vision
    Row("dtop", "vision", None,
        Paper("Dynamic Token Pruning in Plain Vision Transformers for Semantic Segmentation",
              "2308.01045", 2023, "zbwxp/Dynamic-Token-Pruning"),
        ("segmentation model", "training"), "20 to 35% less computation",
        "Let tokens of easy image regions leave a vision transformer early."),
    Row("idpruner", "vision", None,
        Paper("IDPruner: Harmonizing Importance and Diversity in Visual Token Pruning for MLLMs",
              "2602.13315", 2026, "Tencent/AngelSlim"),
        ("vision-language model", "trained scorer"), "one selection an image",
        "Keep visual tokens by maximal marginal relevance of importance and diversity."),
    Row("information-horizon", "vision", None,
        Paper("All You Need Are Random Visual Tokens? Demystifying Token Pruning in VLLMs",
              "2512.07580", 2025),
        ("vision-language model", "training-free"), "one measurement a model",
        "Measure the layer where visual tokens stop mattering, and prune at random beyond it."),
    Row("stts", "vision", None,
        Paper("Unified Spatio-Temporal Token Scoring for Efficient Video VLMs", "2603.18004", 2026,
              "allenai/STTS"),
        ("video-language model", "trained scorer"), "half the visual tokens",
        "Drop half of a video's tokens by a small learned scorer."),
    Row("transprune", "vision", None,
        Paper("TransPrune: Token Transition Pruning for Efficient Large Vision-Language Model",
              "2507.20630", 2025, "liaolea/TransPrune"),
        ("vision-language model", "training-free"), "hooks on a few layers",
        "Prune image tokens by how much they change from layer to layer."),
    Row("vflowopt", "vision", None,
        Paper("VFlowOpt: A Token Pruning Framework for LMMs with Visual Information Flow-Guided "
              "Optimization", "2508.05211", 2025, "sihany077/VFlowOpt"),
        ("vision-language model", "calibration"), "one search a model",
        "Prune in three stages with recycled tokens and a plan found by Bayesian search."),
    Row("zoo-prune", "vision", None,
        Paper("Training-Free Token Pruning via Zeroth-Order Gradient Estimation in Vision-Language Models",
              "2509.24837", 2025),
        ("vision-language model", "training-free"), "perturbed projector passes",
        "Keep the visual tokens whose small perturbation moves the projector's output most."),

    # images
    Row("cubid", "images", None,
        Paper("Cubic Discrete Diffusion: Discrete Visual Generation on High-Dimensional Representation "
              "Tokens", "2603.19232", 2026, "YuqingWang1029/CubiD"),
        ("vision encoder", "training"), "a training run",
        "Generate images by predicting single entries of a cube of quantised features."),
    Row("detailflow", "images", None,
        Paper("DetailFlow: 1D Coarse-to-Fine Autoregressive Image Generation via Next-Detail Prediction",
              "2505.21473", 2025, "ByteFlow-AI/DetailFlow"),
        ("training",), "a training run",
        "Order an image's tokens by resolution and decode them in self-correcting groups."),
    Row("flextok", "images", None,
        Paper("FlexTok: Resampling Images into 1D Token Sequences of Flexible Length", "2502.13967", 2025,
              "apple/ml-flextok"),
        ("training",), "a training run",
        "Describe an image with any number of ordered tokens, from 1 to 256."),
    Row("hi-mar", "images", None,
        Paper("Hierarchical Masked Autoregressive Models with Low-Resolution Token Pivots",
              "2505.20288", 2025, "HiDream-ai/himar"),
        ("training",), "a training run; then 4 full-resolution steps",
        "Draw a few low-resolution tokens first and use them as pivots for the rest."),
    Row("karl", "images", None,
        Paper("Single-pass Adaptive Image Tokenization for Minimum Program Search", "2507.07995", 2025,
              "ShivamDuggal4/karl"),
        ("training",), "a training run; then one pass an image",
        "Decide in one pass how many tokens an image needs for a wanted quality."),
    Row("longcat-next", "images", None,
        Paper("LongCat-Next: Lexicalizing Modalities as Discrete Tokens", "2603.27538", 2026,
              "meituan-longcat/LongCat-Next"),
        ("training",), "a training run",
        "Turn images of any resolution into hierarchical tokens of a next-token model."),
    Row("mingtok", "images", None,
        Paper("Ming-UniVision: Joint Image Understanding and Generation with a Unified Continuous Tokenizer",
              "2510.06590", 2025, "inclusionAI/Ming-UniVision"),
        ("training",), "a training run",
        "See and draw with one continuous image tokenizer inside one next-token model."),
    Row("mvar", "images", None,
        Paper("MVAR: Visual Autoregressive Modeling with Scale and Spatial Markovian Conditioning",
              "2505.12742", 2025, "CVL-UESTC/MVAR"),
        ("training",), "a training run; then no cache",
        "Predict each scale from the adjacent one and a local window only."),
    Row("ordered-token-search", "images", None,
        Paper("(1D) Ordered Tokens Enable Efficient Test-Time Search", "2604.15453", 2026,
              "EPFL-VILAB/search-over-tokens"),
        ("ordered image tokenizer", "verifier"), "a verifier call a candidate",
        "Steer image generation by scoring decoded token prefixes with a verifier."),
    Row("retok", "images", None,
        Paper("Improving Flexible Image Tokenizers for Autoregressive Image Generation", "2601.01535", 2026,
              "zfu006/ReTok"),
        ("training",), "a training run",
        "Train a flexible-length image tokenizer whose late tokens still matter."),
    Row("textok", "images", None,
        Paper("Language-Guided Image Tokenization for Generation", "2412.05796", 2024),
        ("training", "captions"), "a training run",
        "Give the caption to the image tokenizer, so that tokens carry what words do not say."),
    Row("titok", "images", None,
        Paper("An Image is Worth 32 Tokens for Reconstruction and Generation", "2406.07550", 2024,
              "bytedance/1d-tokenizer"),
        ("training",), "a training run",
        "Turn an image into a sequence of 32 to 128 tokens and back."),
    Row("tokenunify", "images", None,
        Paper("TokenUnify: Scalable Autoregressive Visual Pre-training with Mixture Token Prediction",
              "2405.16847", 2024, "ydchen0806/TokenUnify"),
        ("pre-training",), "a training run",
        "Pre-train image encoders on random, next and all following tokens at once."),

    # recommendation
    Row("setrec", "recommendation", None,
        Paper("Order-agnostic Identifier for Large Language Model-based Generative Recommendation",
              "2502.10833", 2025, "Linxyhaha/SETRec"),
        ("training",), "one pass a recommendation",
        "Recommend by generating a set of order-free item tokens in one pass."),

    # knowledge
    Row("distill-synthkg", "knowledge", None,
        Paper("Distill-SynthKG: Distilling Knowledge Graph Synthesis Workflow for Improved Coverage and "
              "Efficiency", "2410.16597", 2024),
        ("fine-tuning",), "one pass a document",
        "Turn a whole document into a knowledge graph with one pass of a small model."),

    # peers
    Row("transformers", "peers", "tokenry.evaluation.peers:TransformersGenerate", None,
        ("training-free",), "one forward pass a token",
        "transformers' own generate.", "peer"),
    Row("transformers-prompt-lookup", "peers", "tokenry.evaluation.peers:TransformersPromptLookup", None,
        ("training-free",), "a wider verify pass where text repeats",
        "transformers' generate with prompt_lookup_num_tokens.", "peer"),
    Row("transformers-assisted", "peers", "tokenry.evaluation.peers:TransformersAssisted", None,
        ("draft model",), "draft passes for a wider verify pass",
        "transformers' generate with an assistant_model.", "peer"),
)
# fmt: on

TRAINERS: dict[str, str] = {
    "adaspec": "tokenry.speculation.adaspec:AdaSpecTrainer",
    "any-order": "tokenry.speculation.any_subset.training:AnyOrderTrainer",
    "ftp": "tokenry.speculation.future_token_prediction.training:FutureTokenPredictionTrainer",
    "hamburger": "tokenry.speculation.hamburger.training:HamburgerTrainer",
    "kv-prediction": "tokenry.kvcache.kv_prediction.training:KVPredictionTrainer",
    "mtp": "tokenry.speculation.gated_lora_mtp.training:MTPTrainer",
    "router": "tokenry.decoding.r2r.training:RouterTrainer",
    "skipdecode": "tokenry.decoding.skipdecode.training:SkipDecodeTrainer",
    "ngram": "tokenry.decoding.superposed.ngram:NgramTrainer",
    "token-recycling": "tokenry.speculation.hot_start:HotStart",
}
"""What `tokenry train NAME` runs: name -> "module:Class" of a `tokenry.objectives.Trainable`."""

BY_SLUG: dict[str, Row] = {row.slug: row for row in ROWS}
BY_TARGET: dict[str, Row] = {row.target: row for row in ROWS if row.target}

_DRAFTS, _KEEPS = ("draft-and-verify", "distribution"), ("memory", "approximate")


def _traits(way: tuple[str, Any], cache: str, **others: Any) -> Traits:
    return Traits(way=way[0], exactness=way[1], cache=cache, **others)


TRAITS: dict[str, Traits] = {
    "plain": Traits(way="one-by-one", exactness="distribution"),
    "transformers": Traits(way="one-by-one", exactness="distribution"),
    "prompt-lookup": _traits(_DRAFTS, "crop"),
    "suffix": _traits(_DRAFTS, "crop"),
    "self-draft": _traits(_DRAFTS, "crop"),
    "token-recycling": _traits(_DRAFTS, "tree"),
    "goose": _traits(_DRAFTS, "tree"),
    "draft-model": _traits(_DRAFTS, "crop", second_model=True),
    "draft-tree": _traits(_DRAFTS, "tree", second_model=True),
    "dyspec": _traits(_DRAFTS, "tree", second_model=True),
    "hamburger:lossless=true": _traits(_DRAFTS, "crop", training="fine-tuning", second_model=True),
    "transformers-prompt-lookup": _traits(_DRAFTS, "crop", batches=False),
    "transformers-assisted": _traits(_DRAFTS, "crop", second_model=True, batches=False),
    "gated-lora-mtp": _traits(("multiple-token-prediction", "distribution"), "crop", training="heads"),
    "future-token-prediction": _traits(("multiple-token-prediction", "distribution"), "crop", training="heads"),
    "hamburger": _traits(("multiple-token-prediction", "approximate"), "append", training="fine-tuning"),
    "any-subset-speculative-decoding": _traits(("masked", "other"), "none", training="pre-training"),
    "cntp": _traits(("choice", "approximate"), "branch"),
    "exact-byte-probabilities": _traits(("choice", "approximate"), "branch"),
    "in-context-navigation": _traits(("several-texts", "approximate"), "branch"),
    "superposed-decoding": _traits(("several-texts", "approximate"), "append", training="table", samples=False),
    "r2r": _traits(("model-size", "approximate"), "partial", training="heads", second_model=True),
    "skipdecode": _traits(("depth", "approximate"), "partial", training="fine-tuning"),
    "dapq": _traits(_KEEPS, "budget"),
    "fasa": _traits(_KEEPS, "append"),
    "fastkv": _traits(_KEEPS, "budget"),
    "h2o": _traits(_KEEPS, "budget"),
    "icecache": _traits(_KEEPS, "append"),
    "keyformer": _traits(_KEEPS, "budget"),
    "kv-prediction": _traits(_KEEPS, "append", training="heads", second_model=True),
    "lazyllm": _traits(_KEEPS, "partial"),
    "sentencekv": _traits(_KEEPS, "append"),
    "keydiff": _traits(_KEEPS, "budget"),
    "sinks": _traits(_KEEPS, "budget"),
    "snapkv": _traits(_KEEPS, "budget"),
    "spatten": _traits(_KEEPS, "budget"),
    "treekv": _traits(_KEEPS, "budget"),
    "random": _traits(("control", "approximate"), "budget"),
    "oracle": _traits(("control", "approximate"), "append"),
}
"""The taxonomy by text form; a form with a parameter is another way of the same method. What trains is not in it."""
