# complete.bash SCRIPT WORD...: what bash offers after these words (the last one begun), one a line.
. "$1"
shift
COMP_WORDS=("$@") COMP_CWORD=$(($# - 1)) COMPREPLY=()
compopt() { :; } # there is no completion under way that it could tune
_orcd
printf '%s\n' "${COMPREPLY[@]}"
