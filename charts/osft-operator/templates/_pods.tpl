{{/*
What decides where a pod may run: the same for the operator and for the pod of `helm test`, which would
else wait on nodes whose taints only the operator tolerates.
*/}}
{{- define "osft-operator.scheduling" -}}
{{- range $name := list "priorityClassName" "nodeSelector" "tolerations" "affinity" }}
{{- with index $.Values $name }}
{{ dict $name . | toYaml }}
{{- end }}
{{- end }}
{{- end }}
