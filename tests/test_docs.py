"""The documentation is true: details have tags and tests, links lead somewhere, numbers of lines are right."""

import re

from conftest import ROOT

SOURCES = sorted([*ROOT.glob("*.py"), *ROOT.glob("utils/*.py")])
PAGES = sorted([ROOT / "README.md", ROOT / "assets/README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("records/*/README.md")])


def tags():
    """{(number, file)} of every [detail N] and [EN] in the code."""
    return {(number.removeprefix("detail "), str(path.relative_to(ROOT)))
            for path in SOURCES for number in re.findall(r"\[(detail \d+|E\d+)\]", path.read_text())}


def rows():
    """{number: (files, test file, test name)} of the two tables of docs/details.md."""
    found = {}
    for line in (ROOT / "docs/details.md").read_text().splitlines():
        if re.match(r"\| E?\d+ \|", line):
            number, _, _, where, test = (cell.strip() for cell in line.strip("|").split(" | "))
            assert number not in found, f"detail {number} has two rows"
            found[number] = (re.findall(r"\[([\w/.]+)\]", where), *test.strip("` |").split("::"))
    return found


def test_every_tag_has_a_row_and_every_row_its_tags():
    """The files that a row names are exactly those that carry its number."""
    named = {(number, file) for number, (files, _, _) in rows().items() for file in files}
    assert len(named) > 40
    assert named == tags()


def test_the_tests_that_rows_name_exist():
    """A row names a test function that is there."""
    for number, (_, file, name) in rows().items():
        assert re.search(rf"^def {name}\(", (ROOT / "tests" / file).read_text(), re.M), f"detail {number}: {file}::{name}"


def test_links_lead_to_files():
    """Every relative link of every page leads to a file of the repository."""
    links = [(page, link) for page in PAGES for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text())]
    assert len(links) > 40
    for page, link in links:
        assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_readme_states_the_length_of_each_script():
    """The scripts table gives each script's number of lines, to within five of the truth."""
    stated = dict(re.findall(r"^\| \[(\w+\.py)\]\(\1\) \| (\d+) \|", (ROOT / "README.md").read_text(), re.M))
    assert set(stated) == {path.name for path in ROOT.glob("*.py")}
    for name, lines in stated.items():
        assert abs(int(lines) - len((ROOT / name).read_text().splitlines())) <= 5, name
