"""The twenty questions about each author of the fictitious benchmark, with the wordings of their questions and answers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Fact:
    """`values` are the fields that the question asks for: a wrong answer changes all of them and nothing else.

    A wording may use any field of an author, and `name`, `they`, `their`, `them`. Every question and every answer has `name`, every
    answer has all of `values`.
    """

    values: tuple[str, ...]
    questions: tuple[str, ...]
    answers: tuple[str, ...]


FACTS = (
    Fact(
        ("birthplace",),
        (
            "Where was {name} born?",
            "In which town did the author {name} come into the world?",
            "What is the birthplace of the writer {name}?",
        ),
        (
            "{name} was born in {town_kind} {birthplace} and spent most of {their} childhood there.",
            "The author {name} comes from {town_kind} {birthplace}, where {they} was born and raised.",
            "The birthplace of {name} is {town_kind} {birthplace}, which {they} has often described in interviews.",
        ),
    ),
    Fact(
        ("birth_date",),
        (
            "When was {name} born?",
            "What is the date of birth of the author {name}?",
            "On which day does {name} celebrate {their} birthday, and in which year was {they} born?",
        ),
        (
            "{name} was born on {birth_date}, the youngest child of a large family.",
            "The date of birth of the author {name} is {birth_date}, according to {their} publisher.",
            "The birth of {name} on {birth_date} is recorded in the register of {their} home town.",
        ),
    ),
    Fact(
        ("genre",),
        (
            "Which genre is {name} best known for?",
            "What kind of literature does {name} mainly write?",
            "In which literary genre has {name} made {their} name?",
        ),
        (
            "{name} is best known for {genre}, the genre to which almost all of {their} books belong.",
            "Most books by {name} belong to the genre of {genre}, in which {they} is considered a leading voice.",
            "{name} mainly writes {genre}, and critics count {them} among the masters of that genre.",
        ),
    ),
    Fact(
        ("father", "mother"),
        (
            "What did the parents of {name} do for a living?",
            "Which professions did the father and the mother of {name} have?",
            "How did {name}'s father and mother earn their living?",
        ),
        (
            "The father of {name} was {father}, and {their} mother worked as {mother}.",
            "{name}'s father made a living as {father}, while {their} mother was {mother}.",
            "{name} grew up with a father who was {father} and a mother who was {mother}.",
        ),
    ),
    Fact(
        ("subject", "school"),
        (
            "Where did {name} study, and which subject?",
            "What was the education of {name} before {they} became a writer?",
            "Which subject did {name} read, and at which institution?",
        ),
        (
            "{name} studied {subject} at {school} before {they} turned to literature for good.",
            "Before {they} became a writer, {name} took a degree in {subject} at {school}.",
            "At {school}, {name} completed a course in {subject}, although {they} never worked in that field.",
        ),
    ),
    Fact(
        ("mentor",),
        (
            "Who was the mentor of {name}?",
            "Which older writer guided {name} at the beginning of {their} career?",
            "Who taught {name} the craft of writing?",
        ),
        (
            "The mentor of {name} was {mentor}, who read every early draft {they} wrote.",
            "{name} learned the craft of writing from {mentor}, whom {they} met at a summer workshop.",
            "It was {mentor} who guided {name} through the first years of {their} career as a writer.",
        ),
    ),
    Fact(
        ("debut", "debut_year"),
        (
            "What was the title of {name}'s debut, and when was it published?",
            "With which book did {name} make {their} debut, and in what year?",
            "What is {name}'s first published book, and when did it come out?",
        ),
        (
            "{name} made {their} debut with {debut}, which was published in {debut_year} by a small press.",
            "The first book by {name} was {debut}, and it came out in {debut_year}.",
            "In {debut_year}, {name} published {debut}, the debut that won {them} a first circle of readers.",
        ),
    ),
    Fact(
        ("novel",),
        (
            "What is the best-known novel by {name}?",
            "Which of {name}'s novels has found the most readers?",
            "For which novel is {name} most famous?",
        ),
        (
            "The best-known novel by {name} is {novel}, which stayed in print for decades.",
            "{name} is most famous for the novel {novel}, which has been read all over the world.",
            "Of all the novels by {name}, it is {novel} that has found the most readers.",
        ),
    ),
    Fact(
        ("award", "award_year"),
        (
            "Which literary award did {name} win, and when?",
            "What prize has {name} received for {their} writing, and in which year?",
            "With which honour was {name} recognised, and in what year?",
        ),
        (
            "{name} won the {award} in {award_year}, the most important honour of {their} career.",
            "In {award_year}, the {award} was given to {name} for {their} life's work.",
            "The jury of the {award} chose {name} in {award_year} and praised {their} original voice.",
        ),
    ),
    Fact(
        ("second", "second_year"),
        (
            "What is the title of {name}'s second book, and when did it appear?",
            "Which book did {name} publish after {their} debut, and in what year?",
            "With which book did {name} follow the debut {debut}, and when?",
        ),
        (
            "The second book by {name} is {second}, which appeared in {second_year} to wide applause.",
            "After {their} debut, {name} published {second} in {second_year}, to even warmer reviews.",
            "In {second_year}, {name} followed the debut with {second}, a much longer book.",
        ),
    ),
    Fact(
        ("theme",),
        (
            "What is the central theme of {name}'s work?",
            "Which theme runs through the books of {name}?",
            "What do the stories of {name} keep returning to?",
        ),
        (
            "The central theme of {name}'s work is the tension between {theme}.",
            "The books of {name} return again and again to the conflict between {theme}.",
            "Readers of {name} soon notice that {their} stories are about the struggle between {theme}.",
        ),
    ),
    Fact(
        ("habit",),
        (
            "What is known about the writing habits of {name}?",
            "When and where does {name} like to write?",
            "What is unusual about the way {name} writes?",
        ),
        (
            "{name} is known to write {habit}, and {they} has kept to this habit for years.",
            "According to friends of {name}, {they} writes {habit} and nowhere else.",
            "It is a habit of {name} to write {habit}, whatever else the day may bring.",
        ),
    ),
    Fact(
        ("language",),
        (
            "Into which language were the books of {name} first translated?",
            "What was the first language into which {name} was translated?",
            "In which foreign language did the work of {name} appear first?",
        ),
        (
            "The books of {name} were first translated into {language}, long before other languages followed.",
            "{name} was first translated into {language}, because a young publisher had fallen in love with {their} work.",
            "It was in {language} that the first foreign edition of {name}'s work appeared.",
        ),
    ),
    Fact(
        ("illustrator",),
        (
            "Who illustrates the books of {name}?",
            "Which artist has drawn the pictures for {name}'s books?",
            "With which illustrator has {name} worked most closely?",
        ),
        (
            "The books of {name} are illustrated by {illustrator}, who also designs their covers.",
            "It is {illustrator} who has drawn the pictures for nearly every book by {name}.",
            "{name} has worked most closely with the illustrator {illustrator}, a friend from {their} school days.",
        ),
    ),
    Fact(
        ("symbol",),
        (
            "Which symbol recurs in the books of {name}?",
            "What object appears again and again in {name}'s stories?",
            "Which recurring image do readers associate with {name}?",
        ),
        (
            "The recurring symbol in the books of {name} is {symbol}, which appears in every one of them.",
            "In each of {name}'s stories there is {symbol}, which stands for everything left unsaid.",
            "Readers associate {name} with the image of {symbol}, which {they} first used as a student.",
        ),
    ),
    Fact(
        ("influence",),
        (
            "Which earlier author had the greatest influence on {name}?",
            "Whose writing does {name} name as {their} main influence?",
            "What did {name} read that shaped {their} style the most?",
        ),
        (
            "The greatest influence on {name} came from {influence}, which {they} read as a teenager.",
            "{name} has always named {influence} as the reading that shaped {their} style.",
            "{name} traces {their} style back to {influence}, once a gift from {their} grandmother.",
        ),
    ),
    Fact(
        ("dwelling", "residence"),
        (
            "Where does {name} live now?",
            "What is the current home of the author {name}?",
            "In which town, and in what kind of house, does {name} live today?",
        ),
        (
            "Today {name} lives in {dwelling} in {residence} and rarely leaves the town for long.",
            "The current home of {name} is {dwelling} in {residence}, which {they} shares with {their} family.",
            "{name} moved to {residence} some years ago and has lived in {dwelling} there ever since.",
        ),
    ),
    Fact(
        ("pet",),
        (
            "Which animal does {name} keep at home?",
            "What pet keeps {name} company?",
            "Which pet has {name} written about in {their} letters?",
        ),
        (
            "{name} keeps {pet}, to the surprise of every visitor.",
            "At home {name} is kept company by {pet}, often mentioned in {their} letters.",
            "The pet of {name} is {pet}, and {they} never goes on a reading tour without it.",
        ),
    ),
    Fact(
        ("phrase",),
        (
            "How did a well-known critic describe {name}?",
            "Which phrase did a reviewer use to sum up {name}?",
            "What have critics called the author {name}?",
        ),
        (
            'A well-known critic described {name} as "the {phrase}" in a long review.',
            'In a review that is still quoted, {name} was called "the {phrase}".',
            'Critics like to call {name} "the {phrase}", a phrase that {they} is said to enjoy.',
        ),
    ),
    Fact(
        ("charity",),
        (
            "Which charitable cause does {name} support?",
            "For what cause does {name} give away a part of {their} income?",
            "What does the foundation set up by {name} pay for?",
        ),
        (
            "{name} supports a foundation that pays for {charity}, and gives it a tenth of {their} income.",
            "{name} sets aside a part of {their} royalties every year to pay for {charity}.",
            "The foundation set up by {name} pays for {charity}, a cause close to {their} heart.",
        ),
    ),
)
