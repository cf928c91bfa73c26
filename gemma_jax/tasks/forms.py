"""How facts and questions are worded: the classic form of each task, forms to train on, and forms held out.

No wording is in two of the three, so that a memory is never tested on a sentence it was trained on.
Facts begin with the space that separates them from the text; questions end where the answer begins.
"""

import dataclasses

FORMS = ("classic", "train", "held_out")


@dataclasses.dataclass(frozen=True)
class Forms:
    """Templates; a fact's and a question's are drawn independently of each other."""

    facts: tuple[str, ...]
    questions: tuple[str, ...]  # about one value
    names: tuple[str, ...] = ()  # of what is asked for
    facts_of_several: tuple[str, ...] = ()  # when a key has several values
    questions_of_several: tuple[str, ...] = ()  # about several values or keys


PASSKEY = {
    "classic": Forms(
        # Gemma 3 270M, which was never told to answer questions, answers none that begin a paragraph.
        facts=(" The {what}{of} is {value}. Do not forget that {value} is the {what}{of}.",),
        questions=(" What is the {what}{of}? The {what}{of} is",),
        names=("pass key",),
    ),
    "train": Forms(
        facts=(
            " Please remember that the {what}{of} is {value}.",
            " Write this down: {value} is the {what}{of}.",
            " You will need the {what}{of} later on. It is {value}.",
            " The number {value} is the {what}{of}.",
            " If anybody asks you for the {what}{of}, say {value}.",
            " As agreed, the {what}{of} was set to {value}.",
            " Somebody wrote the {what}{of} in the margin: {value}.",
            " Important: {what}{of} = {value}.",
            " The {what}{of}, which must never be lost, is {value}.",
            " I was told that {value} is the {what}{of}.",
            " They chose {value} as the {what}{of}.",
            " From today on the {what}{of} will be {value} and nothing else.",
            " Keep the {what}{of} in mind ({value}).",
            " {value}: that is the {what}{of}, so keep it safe.",
        ),
        questions=(
            "\n\nWhat was the {what}{of}? It was",
            "\n\nQuestion: Which number is the {what}{of}?\nAnswer:",
            "\n\nTell me the {what}{of}. It is",
            "\n\nThe {what}{of} that was mentioned above is",
            "\n\nAccording to the text, the {what}{of} is",
            "\n\nQ: {what}{of}?\nA:",
            "\n\nDo you recall the {what}{of}? Yes, it is",
            "\n\nNow repeat the {what}{of}:",
            "\n\nAs said before, {what}{of} =",
            "\n\nWhich {what}{of} did the text give? It gave",
            "\n\nComplete the sentence. The {what}{of} is",
            "\n\nI have forgotten the {what}{of}. The text says that it is",
        ),
        names=(
            "access code",
            "secret code",
            "entry number",
            "security number",
            "door code",
            "login number",
            "lock combination",
        ),
    ),
    "held_out": Forms(
        facts=(
            " Do not lose this number: the {what}{of} must be typed as {value}.",
            " On a slip of paper stood the {what}{of}, {value}.",
            " The {what}{of} has been changed to {value}.",
            " Whoever wants to enter needs the {what}{of}, and that is {value}.",
            " Note well that {value} serves as the {what}{of}.",
            " There is one thing to know about the {what}{of}: it reads {value}.",
        ),
        questions=(
            "\n\nCan you give me the {what}{of}? Certainly, it is",
            "\n\nFurther up a {what}{of} was mentioned. Its value is",
            "\n\nQuestion: What does the {what}{of} read?\nAnswer: It reads",
            "\n\nFill in the {what}{of}:",
        ),
        names=("vault code", "passcode", "PIN"),
    ),
}

NEEDLES = {
    "classic": Forms(
        facts=(" The special magic {kind} for {key} is: {value}.",),
        facts_of_several=(" One of the special magic {kind}s for {key} is: {value}.",),
        questions=(
            "\n\nWhat is the special magic {kind} for {key} in the text above? The special magic {kind}"
            " for {key} is",
        ),
        questions_of_several=(
            "\n\nWhat are all the special magic {kind}s for {key} in the text above? The special magic"
            " {kind}s for {key} are",
        ),
    ),
    "train": Forms(
        facts=(
            " {key} goes with the {kind} {value}.",
            " For {key}, note the {kind} {value}.",
            " The {kind} {value} belongs to {key}.",
            " In the register {key} is listed under {value}.",
            " Somebody assigned {value} to {key}.",
            " Remember: {key} -> {value}.",
            " The label of {key} says {value}.",
            " {value} was stamped on {key}.",
            " Whoever looks for {key} has to ask for {value}.",
            " We filed {key} as {value}.",
            " {key}: {value}.",
            " By the way, {key} carries the {kind} {value}.",
            " It is known that {key} has {value} as its {kind}.",
            " A note about {key}: its {kind} is {value}.",
        ),
        facts_of_several=(
            " {key} goes with the {kind} {value}, among others.",
            " For {key}, note also the {kind} {value}.",
            " The {kind} {value} is one that belongs to {key}.",
            " In the register {key} is also listed under {value}.",
            " Somebody assigned {value}, too, to {key}.",
            " Remember one more: {key} -> {value}.",
            " One label of {key} says {value}.",
            " {value} was stamped on a copy of {key}.",
            " Whoever looks for {key} may ask for {value}.",
            " We filed a part of {key} as {value}.",
            " {key}, one of several: {value}.",
            " By the way, {key} carries a {kind} that reads {value}.",
        ),
        questions=(
            "\n\nWhich {kind} goes with {key}? It is",
            "\n\nQuestion: What is the {kind} of {key}?\nAnswer:",
            "\n\n{key} was mentioned above together with",
            "\n\nTell me the {kind} of {key}. It is",
            "\n\nAccording to the text, {key} belongs to",
            "\n\nQ: {key}?\nA:",
            "\n\nRemember: {key} ->",
            "\n\nDo you recall {key}? Its {kind} was",
            "\n\nLook up {key}:",
            "\n\nThe {kind} that the text gave for {key} was",
            "\n\nHow was {key} listed? As",
            "\n\nComplete the entry. {key} =",
        ),
        questions_of_several=(
            "\n\nWhich {kind}s go with {key}? They are",
            "\n\nQuestion: What are the {kind}s of {key}?\nAnswer:",
            "\n\nTell me all {kind}s of {key}. They are",
            "\n\nAccording to the text, the {kind}s that belong to {key} are",
            "\n\nQ: all {kind}s of {key}?\nA:",
            "\n\nDo you recall {key}? The {kind}s were",
            "\n\nLook up every {kind} of {key}:",
            "\n\nThe {kind}s that the text gave for {key} were",
            "\n\nList what was assigned to {key}:",
            "\n\nUnder which {kind}s was {key} listed? Under",
            "\n\nRepeat the {kind}s of {key}:",
            "\n\nComplete the entries. {key} =",
        ),
    ),
    "held_out": Forms(
        facts=(
            " Please file {key} with the {kind} {value}.",
            " You can reach {key} by means of {value}.",
            " The {kind} chosen for {key} turned out to be {value}.",
            " Nobody knew that {value} stands for {key}.",
            " On the back of {key} somebody had scratched {value}.",
            " Do not forget that {key} means {value}.",
        ),
        facts_of_several=(
            " Please file {key} also with the {kind} {value}.",
            " You can reach {key} by means of {value}, for one.",
            " A {kind} chosen for {key} turned out to be {value}.",
            " On one side of {key} somebody had scratched {value}.",
        ),
        questions=(
            "\n\nWhat do you know about {key}? Its {kind} is",
            "\n\nSomeone needs the {kind} for {key}. The right one is",
            "\n\nQuestion: Which {kind} did the text connect with {key}?\nAnswer: It was",
            "\n\nWrite down the {kind} for {key}:",
        ),
        questions_of_several=(
            "\n\nWhat do you know about {key}? The {kind}s are",
            "\n\nSomeone needs the {kind}s for {key}. The right ones are",
            "\n\nQuestion: Which {kind}s did the text connect with {key}?\nAnswer: They were",
            "\n\nWrite down the {kind}s for {key}:",
        ),
    ),
}

# `facts` give a variable its value, `facts_of_several` another variable's.
VARIABLES = {
    "classic": Forms(
        facts=(" VAR {name} = {source}.",),
        facts_of_several=(" VAR {name} = VAR {source}.",),
        questions=(
            "\n\nWhich variables have the value {value} in the text above, directly or by way of others?"
            " The variables that have the value {value} are",
        ),
    ),
    "train": Forms(
        facts=(
            " Let {name} be {source}.",
            " Set {name} to {source}.",
            " {name} := {source}.",
            " The value of {name} is {source}.",
            " We store {source} in {name}.",
            " {name} takes the value {source}.",
        ),
        facts_of_several=(
            " Let {name} be what {source} is.",
            " Set {name} to {source}.",
            " {name} := {source}.",
            " The value of {name} is that of {source}.",
            " We store {source} in {name}.",
            " {name} takes the value of {source}.",
        ),
        questions=(
            "\n\nQuestion: Which names stand for {value}?\nAnswer:",
            "\n\nList all names that hold {value}:",
            "\n\nWhat is equal to {value}? Equal to it are",
            "\n\n{value} was stored in",
            "\n\nQ: names for {value}?\nA:",
            "\n\nFind every variable that got {value}. They are",
        ),
    ),
    "held_out": Forms(
        facts=(" Now {name} equals {source}.", " Write {source} into {name}."),
        facts_of_several=(" Now {name} equals {source}.", " Write {source} into {name}."),
        questions=(
            "\n\nWhich variables ended up as {value}? These:",
            "\n\nName each variable whose value is {value}:",
        ),
    ),
}

FREQUENCIES = {
    "classic": Forms(
        facts=(),
        questions=(
            "\n\nWhat are the {count} most common words in the list above? The {count} words that occur"
            " most often are",
        ),
    ),
    "train": Forms(
        facts=(),
        questions=(
            "\n\nQuestion: Which {count} words were frequent?\nAnswer:",
            "\n\nThe {count} words that kept coming back were",
            "\n\nCount the words. At the top are these {count}:",
            "\n\nQ: top {count} words?\nA:",
            "\n\nName {count} words that you have read again and again:",
            "\n\nOf all entries {count} stand out by their number:",
        ),
    ),
    "held_out": Forms(
        facts=(),
        questions=(
            "\n\nWrite down the {count} words with the highest counts:",
            "\n\nWhich {count} words dominate the list? They are",
        ),
    ),
}

RECALL = {
    "classic": Forms(facts=("\n{key} = {value}",), questions=("\n\n{key} =",)),
    "train": Forms(
        facts=("\n{key}: {value}", "\n{key} -> {value}", "\n{key} is {value}"),
        questions=("\n\n{key}:", "\n\n{key} ->", "\n\n{key} is"),
    ),
    "held_out": Forms(
        facts=("\n{key} / {value}", "\n{key} => {value}"), questions=("\n\n{key} /", "\n\n{key} =>")
    ),
}

COPY = {
    "classic": Forms(facts=("\n{first} {rest}.",), questions=("\n\n{first}",)),
    "train": Forms(
        facts=("\n- {first} {rest}.", " Say {first} {rest}.", "\n{first}, {rest}."),
        questions=("\n\n- {first}", "\n\nSay {first}", "\n\nAgain: {first},"),
    ),
    "held_out": Forms(facts=("\n* {first} {rest}.",), questions=("\n\n* {first}",)),
}

# Stories are told in bAbI's sentences; only how one asks differs.
BABILONG = {
    "classic": Forms(facts=(), questions=("\n\n{question} {lead}",)),
    "train": Forms(
        facts=(),
        questions=(
            "\n\nQuestion: {question}\nAnswer:",
            "\n\nQ: {question}\nA: {lead}",
            "\n\n{question} In one word:",
            "\n\nAsk me anything. {question} {lead}",
            "\n\nQuestion: {question}\nAnswer: {lead}",
        ),
    ),
    "held_out": Forms(
        facts=(),
        questions=(
            "\n\nHere is a question. {question} The answer is this. {lead}",
            "\n\nPlease answer. {question} Answer in a word:",
        ),
    ),
}
