"""What the package carries: the collection with human judgments."""

from gradret.data.lists import split_words
from gradret.data.sources import find_path, open_collection, parse_source
from gradret.settings import MEDQUAD


def test_medquad_has_graded_judgments_of_documents_that_are_there():
    collection = open_collection(parse_source(MEDQUAD))
    documents = {document.doc_id: document for document in collection.documents()}
    judged = [(doc_id, grade) for grades in collection.qrels.values() for doc_id, grade in grades.items()]
    assert (len(collection.queries), len(documents), len(judged)) == (60, 800, 392)
    assert {grade: sum(g == grade for _, g in judged) for grade in (0, 1, 2, 3)} == {0: 169, 1: 117, 2: 56, 3: 50}
    assert {doc_id for doc_id, _ in judged} <= documents.keys()
    assert all(split_words(document.content) for document in documents.values())
    selected = open_collection(parse_source(f"{MEDQUAD}?queries=even&grades=1:0"))
    assert 0 < len(selected.queries) < 60


def test_medquad_names_its_source_licence_and_changes():
    notice = (find_path(MEDQUAD) / "README.md").read_text()
    assert all(words in notice for words in ("CC BY 4.0", "github.com/abachaa/MedQuAD", "Ben Abacha", "Changed"))
