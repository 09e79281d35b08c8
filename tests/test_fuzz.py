"""Everything that fuzzing ever found interesting, again; ``scripts/fuzz.py`` looks for more."""

import fuzz_targets
import pytest
from fuzz_targets import TARGETS


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.filterwarnings("ignore")
def test_no_file_of_the_corpus_does_more_than_be_refused(name: str) -> None:
    for content in fuzz_targets.corpus(name):
        TARGETS[name].run(content)
