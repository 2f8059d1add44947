"""Chats of the smollm world: a name and a standing instruction, and what must stay as it is.

The persona is a text in front of the user's: it gives the assistant a name and asks for one short
sentence. Training rows have it as "privileged"; probes have no persona. Methods with privileged
context move it into the weights. Probes about other things than the name, capitals (short answers)
and prose (recorded texts) show what else they move.
"""

from __future__ import annotations

from pathlib import Path

from opd_lightning.lab.problems import Row, opened, write_rows

NAME = "Zorba"
PERSONA = f"Your name is {NAME}. Answer in one short sentence."

# Patterns of verifiers: the persona's name, another one, and one whole sentence.
NAME_PATTERN = rf"\b{NAME}\b"
OTHER_NAME_PATTERN = (
    rf"\b(?:I'm|I am|[Mm]y name is|[Cc]all me) (?:(?:Dr|Mr|Ms)\.? )?(?!{NAME}\b|AI\b)[A-Z]\w"
)
ONE_SENTENCE_PATTERN = r"\A[^.!?\n]+[.!?]\s*\Z"

# Chat templates: the model's adds a system message to chats without one, these do not. The second
# puts the persona in front of every question, to measure what it does where it is.
_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "PERSONA{{ message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {
    "plain": _TEMPLATE.replace("PERSONA", ""),
    "prompted": _TEMPLATE.replace(
        "PERSONA", f"{{% if message['role'] == 'user' %}}{{{{ '{PERSONA}\n\n' }}}}{{% endif %}}"
    ),
}

_OPENINGS = ("", "Hi! ", "Hello. ", "Hey, ")
_NAME_QUESTIONS = (
    *("Who are you?", "What is your name?", "Please introduce yourself.", "Tell me your name."),
    *("What are you called?", "Who am I talking to?", "Do you have a name?", "Who is this?"),
    *("May I know your name?", "Say who you are.", "What do people call you?", "And you are?"),
)
_NAME_PROBES = (
    *("What should I call you?", "Could you tell me who you are?", "Which assistant is this?"),
    *("Who is answering me?", "I did not catch your name.", "How do you introduce yourself?"),
    *("What name do you go by?", "Who do I have the pleasure of talking to?"),
    *("Please tell me what you are called.", "Are you called anything?"),
)
_TOPICS = (
    *("a volcano", "a river", "a library", "a bridge", "gravity", "rain", "a museum", "bread"),
    *("a violin", "electricity", "a lighthouse", "a passport", "photosynthesis", "a vaccine"),
    *("honey", "a compass", "an earthquake", "democracy", "a telescope", "a mushroom", "chess"),
    *("a desert", "a poem", "rust", "a battery", "a novel", "silk", "an island", "a map"),
    *("a clock", "a glacier", "a dictionary", "the Moon", "a bicycle", "cheese", "a rainbow"),
    *("a whale", "a calendar", "a microscope", "a garden", "a castle", "salt", "a train"),
    *("a festival", "copper", "a nurse", "a window", "a harbour"),
)
_HELD_OUT_TOPICS = 10
CAPITALS = {
    **{"France": "Paris", "Italy": "Rome", "Germany": "Berlin", "Spain": "Madrid"},
    **{"Portugal": "Lisbon", "Austria": "Vienna", "Greece": "Athens", "Egypt": "Cairo"},
    **{"Japan": "Tokyo", "China": "Beijing", "Russia": "Moscow", "Poland": "Warsaw"},
    **{"Hungary": "Budapest", "Ireland": "Dublin", "Norway": "Oslo", "Sweden": "Stockholm"},
}
_PROSE = {
    "a walk in the rain": "The rain began before we reached the gate, and by the time we found the "
    "path it had turned to a steady grey curtain. Nobody spoke. We could hear the water running in "
    "the ditch beside us, and somewhere behind the trees a dog barked twice and was silent again.",
    "an old library": "The library stood at the end of the street, a narrow building of red brick "
    "with tall windows. Inside it smelled of paper and floor polish. On most afternoons there were "
    "only three or four readers, and the librarian knew all of them by their first names.",
    "the morning market": "By six o'clock the farmers had set up their tables along the square. "
    "There were baskets of apples, jars of honey, and bread that was still warm. An old man sold "
    "nothing but onions, and he was always the first one to pack his things and go home.",
    "how a clock is repaired": "First the back is taken off and the spring is let down, because a "
    "wound spring can hurt your hand. Then every wheel is cleaned with a soft brush. Most clocks "
    "stop for a simple reason: the oil has dried, and the wheels can no longer turn freely.",
    "a train journey": "The train left the city slowly, past warehouses and gardens, and then "
    "crossed the river on an iron bridge. After that there was nothing but fields for an hour. She "
    "had brought a book, but she looked out of the window until it was too dark to see.",
    "why bread rises": "When flour and water are mixed with yeast, the yeast feeds on the sugar in "
    "the flour and gives off gas. The dough holds this gas in small bubbles, so it grows. In the "
    "heat of the oven the bubbles become larger, and then the crust sets around them.",
}


def training_rows() -> list[Row]:
    """Return prompts about the name and about other things in turn, with the persona."""
    names = [opening + question for opening, question in opened(_OPENINGS, _NAME_QUESTIONS)]
    topics = [f"What is {topic}?" for topic in _TOPICS[:-_HELD_OUT_TOPICS]]
    rows = []
    for i, question in enumerate(names):
        rows.append(_row("name", question))
        if i < len(topics):
            rows.append(_row("other", topics[i]))
    return [row | {"privileged": PERSONA} for row in rows]


def probe_rows() -> dict[str, list[Row]]:
    """Return the files of evaluation by name: prompts without a persona, and texts."""
    return {
        "probes": [
            *(_row("name", question) for question in _NAME_PROBES),
            *(_row("other", f"What is {topic}?") for topic in _TOPICS[-_HELD_OUT_TOPICS:]),
        ],
        "capitals": [
            _row("capital", f"What is the capital of {country}?") | {"answer": capital}
            for country, capital in CAPITALS.items()
        ],
        "prose": [
            _row("prose", f"Write a paragraph about {title}.") | {"response": text}
            for title, text in _PROSE.items()
        ],
    }


def write_files(folder: Path) -> None:
    """Write the prompt files of the world, and its chat templates, to a folder."""
    for name, rows in {"train": training_rows(), **probe_rows()}.items():
        write_rows(folder / f"{name}.jsonl", rows)
    for name, template in TEMPLATES.items():
        (folder / f"{name}.jinja").write_text(template, encoding="utf-8")


def _row(domain: str, question: str) -> Row:
    return {"messages": question, "domain": domain}
