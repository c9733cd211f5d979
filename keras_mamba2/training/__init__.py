"""What training needs beside the models. A leaf: it knows no model class."""

from keras_mamba2.training.backup import BackupAndRestore as BackupAndRestore
from keras_mamba2.training.backup import SharedBackupAndRestore as SharedBackupAndRestore
from keras_mamba2.training.recipe import adamw_recipe as adamw_recipe
from keras_mamba2.training.resume import SeedByEpoch as SeedByEpoch
from keras_mamba2.training.resume import restore as restore
from keras_mamba2.training.stateful import ConsecutiveWindows as ConsecutiveWindows
from keras_mamba2.training.stateful import StatefulTraining as StatefulTraining
