{{/* Labels of every installed object. */}}
{{- define "vmbackup.labels" -}}
app.kubernetes.io/name: vmbackup
app.kubernetes.io/part-of: vmbackup
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end }}

{{/* The objects of a file that kustomize uses too, in the namespace of the release and with the labels of the chart. */}}
{{- define "vmbackup.objects" -}}
{{- $text := .root.Files.Get .file | required (printf "%s is not in this chart" .file) -}}
{{- range $document := splitList "\n---\n" $text }}
{{- $object := fromYaml $document }}
{{- $metadata := $object.metadata }}
{{- $_ := set $metadata "labels" (merge ($.labels | default dict) ($metadata.labels | default dict) (include "vmbackup.labels" $.root | fromYaml)) }}
{{- if $.annotations }}
{{- $_ := set $metadata "annotations" (merge $.annotations ($metadata.annotations | default dict)) }}
{{- end }}
{{- if $metadata.namespace }}
{{- $_ := set $metadata "namespace" $.root.Release.Namespace }}
{{- end }}
{{- range $subject := $object.subjects }}
{{- if $subject.namespace }}
{{- $_ := set $subject "namespace" $.root.Release.Namespace }}
{{- end }}
{{- end }}
---
{{ toYaml $object }}
{{- end }}
{{- end }}

{{- define "vmbackup.image" -}}
{{- with .Values.image -}}
{{ .repository }}{{ if .digest }}@{{ .digest }}{{ else }}:{{ .tag | default $.Chart.AppVersion }}{{ end }}
{{- end }}
{{- end }}

{{/* Names of volumes: images, images-1, images-2, … */}}
{{- define "vmbackup.volume" -}}
{{ .kind }}{{ if .index }}-{{ .index }}{{ end }}
{{- end }}

{{/* VMBACKUP_IMAGE_ROOTS: the directories that may contain images. */}}
{{- define "vmbackup.imageRoots" -}}
{{ join ":" .Values.hostPaths.images }}{{ if .Values.blockDevices.enabled }}:/dev{{ end }}
{{- end }}
