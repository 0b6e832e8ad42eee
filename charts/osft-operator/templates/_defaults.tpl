{{/*
`helm upgrade --reuse-values` gives a chart the values of the release before, so those that it has added
since are missing. Every template begins with this, which fills them in from files/defaults.yaml, the
values of values.yaml without their comments (a chart cannot read that file itself).
*/}}
{{- define "osft-operator.defaults" -}}
{{- include "osft-operator.fill" (list .Values (.Files.Get "files/defaults.yaml" | fromYaml)) }}
{{- end }}

{{/* Call with a list of given values and defaults. What is there stays, also where it is empty. */}}
{{- define "osft-operator.fill" -}}
{{- $given := first . }}
{{- range $name, $default := last . }}
{{- if not (hasKey $given $name) }}
{{- $_ := set $given $name $default }}
{{- else if and (kindIs "map" $default) (kindIs "map" (index $given $name)) (not (has $name (list "labels" "annotations" "requests" "limits"))) }}
{{- include "osft-operator.fill" (list (index $given $name) $default) }}
{{- end }}
{{- end }}
{{- end }}
