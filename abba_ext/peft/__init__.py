"""ABBA as a method of Hugging Face PEFT: importing this module registers it as "ABBA"."""
from .registration import register  # first: it says what to install where PEFT is missing or too old
from .config import AbbaPeftConfig
from .layer import AbbaTunerLayer, AbbaTunerLinear, ParamWrapper
from .model import AbbaModel

register(AbbaPeftConfig, AbbaModel)

__all__ = ["AbbaModel", "AbbaPeftConfig", "AbbaTunerLayer", "AbbaTunerLinear", "ParamWrapper"]
