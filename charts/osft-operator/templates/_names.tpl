{{/* Names, labels and image references. Used by every template. */}}

{{- define "osft-operator.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" }}
{{- end }}

{{/* 52 characters leave room for the longest suffix, "-job-viewer", in a 63 character name. */}}
{{- define "osft-operator.fullname" -}}
{{- $name := default .Chart.Name .Values.nameOverride }}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 52 | trimSuffix "-" }}
{{- else if contains $name .Release.Name }}
{{- .Release.Name | trunc 52 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name $name | trunc 52 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{/* Never add to these: a Deployment's selector cannot be changed. */}}
{{- define "osft-operator.selectorLabels" -}}
app.kubernetes.io/name: {{ include "osft-operator.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{/* The pod of `helm test`. Not the operator's: its Service must not lead there. */}}
{{- define "osft-operator.testLabels" -}}
app.kubernetes.io/name: {{ include "osft-operator.name" . | trunc 58 | trimSuffix "-" }}-test
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "osft-operator.labels" -}}
{{- with .Values.commonLabels }}
{{- toYaml . }}
{{ end -}}
{{ include "osft-operator.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/component: operator
app.kubernetes.io/part-of: osft
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
{{- end }}

{{- define "osft-operator.serviceAccountName" -}}
{{- if .Values.serviceAccount.create }}
{{- default (include "osft-operator.fullname" .) .Values.serviceAccount.name }}
{{- else }}
{{- default "default" .Values.serviceAccount.name }}
{{- end }}
{{- end }}

{{- define "osft-operator.leaseName" -}}
{{- default (include "osft-operator.fullname" .) .Values.leaderElection.leaseName }}
{{- end }}

{{/* Call with (dict "image" <image values> "root" $): registry/repository:tag or ...@digest. */}}
{{- define "osft-operator.image" -}}
{{- $registry := default .image.registry (.root.Values.global).imageRegistry }}
{{- with $registry }}{{ . }}/{{ end }}
{{- .image.repository }}
{{- if .image.digest }}@{{ .image.digest }}{{ else }}:{{ default .root.Chart.AppVersion .image.tag }}{{ end }}
{{- end }}
