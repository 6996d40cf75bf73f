"""In-Context Navigation: answers already found stand in the prompt, so that the model reaches new ones.

decoder    rounds of first tokens, each read off behind the list so far, and an answer from each
asking     functions over it: lists of answers, chains of thought with a vote
key_space  the vocabulary's keys, their clusters, and whether high ranks go to neighbours of right answers
"""

from tokenry.decoding.in_context_navigation.asking import Answer, Paths, chain_of_thought, navigate
from tokenry.decoding.in_context_navigation.decoder import InContextNavigation
from tokenry.decoding.in_context_navigation.key_space import Clusters, KeySpace, correlation

__all__ = [
    "Answer", "Clusters", "InContextNavigation", "KeySpace", "Paths", "chain_of_thought", "correlation", "navigate",
]  # fmt: skip
