package main

import (
	v1 "k8s.io/api/admissionregistration/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
)

// The API server's own defaults, which its plug-ins expect; they are part of Kubernetes' binary and of no library.
func matchConstraints(object runtime.Object) []*v1.MatchResources {
	switch object := object.(type) {
	case *v1.MutatingAdmissionPolicy:
		return []*v1.MatchResources{object.Spec.MatchConstraints}
	case *v1.ValidatingAdmissionPolicy:
		return []*v1.MatchResources{object.Spec.MatchConstraints}
	case *v1.MutatingAdmissionPolicyBinding:
		return []*v1.MatchResources{object.Spec.MatchResources}
	case *v1.ValidatingAdmissionPolicyBinding:
		return []*v1.MatchResources{object.Spec.MatchResources}
	}
	return nil
}

func setDefaults(constraints *v1.MatchResources) {
	if constraints == nil {
		return
	}
	if constraints.MatchPolicy == nil {
		policy := v1.Equivalent
		constraints.MatchPolicy = &policy
	}
	if constraints.NamespaceSelector == nil {
		constraints.NamespaceSelector = &metav1.LabelSelector{}
	}
	if constraints.ObjectSelector == nil {
		constraints.ObjectSelector = &metav1.LabelSelector{}
	}
	for i := range constraints.ResourceRules {
		if constraints.ResourceRules[i].Scope == nil {
			scope := v1.AllScopes
			constraints.ResourceRules[i].Scope = &scope
		}
	}
}
