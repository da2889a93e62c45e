"""TVQA, STAR and captions in other forms than the published ones, and wrong."""

from faults.case import Case, refused
from faults.damage_tables import star, star_item

STAR = "--dataset star"

STAR_FORMS: dict[str, Case] = {
    "STAR, another id than the key": refused(
        star({"A_1": star_item()}),
        "STAR_val.json['A_1']: 'question_id' is 'Interaction_T1_13', unlike the key",
        line=STAR,
    ),
    "STAR, by id, a number": refused(
        star({"A_1": 3}),
        "STAR_val.json['A_1']: a number where an object is expected",
        line=STAR,
    ),
    "STAR, choices by name": refused(
        star([star_item(choices={"first": "b", "second": "c"})]),
        "STAR_val.json[0]: choice_id 'first' is no integer and no letter",
        line=STAR,
    ),
    "STAR, an answer that fits two choices": refused(
        star([star_item(answer="THE CAT", choices=["The cat.", "The cat", "A dog."])]),
        "STAR_val.json[0]: 'answer' is 'THE CAT', fits more than one of the choices",
        line=STAR,
    ),
    "STAR, answer 4 of 4": refused(
        star([star_item(answer=4)]),
        "STAR_val.json[0]: 'answer' is 4, not one of the choices",
        line=STAR,
    ),
}

FORMATS: dict[str, Case] = {**STAR_FORMS}
