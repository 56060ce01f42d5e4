"""docs/guide.md: its recipes run, and its table says nothing that no test holds."""

import re

import pytest
from horovod_jobs import ROOT, run_ranks
from test_elastic import elastic

GUIDE = (ROOT / "docs" / "guide.md").read_text()
GIVEN, *RECIPES = re.findall(r"^```python\n(.*?)^```", GUIDE, re.MULTILINE | re.DOTALL)
SOURCES = "\n".join(path.read_text() for path in (ROOT / "ds_horovod").rglob("*.py"))
TESTS = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("*.py"))
TABLE = re.findall(r"^\| (.+?) \| (.+?) \| `(\w+)` \|$", GUIDE, re.MULTILINE)


def write(folder, texts):
    files = [folder / f"recipe{i}.py" for i in range(len(texts))]
    for file, text in zip(files, texts, strict=True):
        file.write_text(text)
    return [str(file) for file in files]


@pytest.mark.jobs
def test_recipes(tmp_path):
    recipes = [text for text in RECIPES if "hvd.elastic.run" not in text]
    assert len(recipes) >= 12
    output = run_ranks(2, str(ROOT / "tests" / "workers" / "guide.py"), *write(tmp_path, [GIVEN, *recipes]))
    for i in range(1, len(recipes) + 1):
        assert output.count(f"recipe{i}: ok") == 2, output[-4000:]


@pytest.mark.jobs
def test_the_recipe_of_an_elastic_job(tmp_path):
    (recipe,) = [text for text in RECIPES if "hvd.elastic.run" in text]
    (tmp_path / "train.py").write_text(GIVEN + recipe + 'print(f"ended in epoch {state.epoch}")\n')
    code, output = elastic(tmp_path, tmp_path / "train.py")
    assert code == 0 and output.count("ended in epoch 3") == 2, output[-4000:]


@pytest.mark.parametrize("feature, how, held_by", TABLE, ids=[row[0] for row in TABLE])
def test_a_line_of_the_table(feature, how, held_by):
    assert re.search(rf"def {held_by}\(", TESTS), f"no test is called {held_by}"
    if how.startswith("refused"):
        (message,) = re.findall(r'"(.+)"', how)
        pattern = r"[^\n]*?".join(re.escape(word) for word in re.split(r"hvd\.Adasum$", message) if word)
        text = re.sub(r'"\s*\n\s*f?"', "", SOURCES)  # strings that go on in the next line
        assert re.search(pattern, text) or message in text, f"no error says {message!r}"
    else:
        assert how.startswith("works")


def test_the_table_has_a_line_for_all_of_it():
    rows = GUIDE[GUIDE.index("| feature |") :].strip().splitlines()[2:]
    assert len(rows) == len(TABLE) > 20
