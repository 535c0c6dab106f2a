"""Sentences that hold a number word, in the six languages of the scenario ``digits``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from fedfuse_shared.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np

LANGUAGES: Final = ("en", "fr", "de", "es", "it", "pt")
"""ISO 639-1 codes that eSpeak NG and num2words both know."""

# {word} is the digit's word, {other} the word of an unrelated number from 13 to 99, which often contains a digit's
# word and must not be taken for it.
_TEMPLATES: Final = {
    "en": (
        "The clerk read the figure as {word}.",
        "Someone wrote {word} in the margin.",
        "I believe this one says {word}, but the ink has run.",
        "{word} is what the form shows here.",
        "Field {other} of the form contains {word}.",
        "On page {other} the last figure is {word}.",
        "Please enter {word} and continue with the next line.",
        "After {other} tries we agreed that it must be {word}.",
    ),
    "fr": (
        "L'employé a lu le chiffre {word}.",
        "Quelqu'un a écrit {word} dans la marge.",
        "Je crois que c'est {word}, mais l'encre a coulé.",
        "{word}, voilà ce que montre le formulaire.",
        "La case {other} du formulaire contient {word}.",
        "À la page {other}, le dernier chiffre est {word}.",
        "Veuillez saisir {word} et passer à la ligne suivante.",
        "Après {other} essais, nous avons convenu que c'était {word}.",
    ),
    "de": (
        "Die Sachbearbeiterin las die Ziffer {word}.",
        "Jemand hat {word} an den Rand geschrieben.",
        "Ich glaube, hier steht {word}, aber die Tinte ist verlaufen.",
        "{word} steht an dieser Stelle des Formulars.",
        "Feld {other} des Formulars enthält {word}.",
        "Auf Seite {other} ist die letzte Ziffer {word}.",
        "Bitte {word} eintragen und mit der nächsten Zeile fortfahren.",
        "Nach {other} Versuchen waren wir uns einig, dass es {word} ist.",
    ),
    "es": (
        "El empleado leyó la cifra {word}.",
        "Alguien escribió {word} en el margen.",
        "Creo que aquí pone {word}, pero la tinta se ha corrido.",
        "{word} es lo que muestra el formulario.",
        "La casilla {other} del formulario contiene {word}.",
        "En la página {other} la última cifra es {word}.",
        "Introduzca {word} y continúe con la línea siguiente.",
        "Tras {other} intentos acordamos que tenía que ser {word}.",
    ),
    "it": (
        "L'impiegato ha letto la cifra {word}.",
        "Qualcuno ha scritto {word} a margine.",
        "Credo che qui ci sia {word}, ma l'inchiostro è colato.",
        "{word} è quello che mostra il modulo.",
        "La casella {other} del modulo contiene {word}.",
        "A pagina {other} l'ultima cifra è {word}.",
        "Inserire {word} e continuare con la riga seguente.",
        "Dopo {other} tentativi abbiamo deciso che doveva essere {word}.",
    ),
    "pt": (
        "O funcionário leu o algarismo {word}.",
        "Alguém escreveu {word} na margem.",
        "Acho que aqui está {word}, mas a tinta escorreu.",
        "{word} é o que mostra o formulário.",
        "O campo {other} do formulário contém {word}.",
        "Na página {other} o último algarismo é {word}.",
        "Introduza {word} e continue na linha seguinte.",
        "Depois de {other} tentativas concordámos que devia ser {word}.",
    ),
}  # fmt: skip

_TYPO_RATE: Final = 0.1


def number_word(number: int, language: str) -> str:
    """Return a number in words.

    Raises:
        ConfigError: num2words is not installed.
    """
    try:
        from num2words import num2words  # noqa: PLC0415 - only in the extra
    except ImportError as error:
        raise ConfigError("sentences need num2words", advice="pip install 'fedfuse[simulation]'") from error
    return str(num2words(number, lang=language))


def sentence(digit: int, language: str, generator: np.random.Generator) -> str:
    """Return a sentence that says a digit; in one of ten, two neighbouring letters somewhere are swapped.

    Raises:
        ConfigError: num2words is not installed.
    """
    templates = _TEMPLATES[language]
    template = templates[generator.integers(len(templates))]
    other = number_word(int(generator.integers(13, 100)), language)
    text = template.format(word=number_word(digit, language), other=other)
    text = text[0].upper() + text[1:]
    if generator.random() < _TYPO_RATE:
        at = int(generator.integers(1, len(text) - 2))
        text = text[:at] + text[at + 1] + text[at] + text[at + 2 :]
    return text
