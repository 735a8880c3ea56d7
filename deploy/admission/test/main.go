// Evaluates the policies of this folder's parent with the admission plug-ins of Kubernetes' API server, and prints a line
// for each case. `run` builds and starts it.
package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/yaml"
	"k8s.io/apiserver/pkg/admission"
	"k8s.io/apiserver/pkg/admission/initializer"
	"k8s.io/apiserver/pkg/admission/plugin/policy/mutating"
	"k8s.io/apiserver/pkg/admission/plugin/policy/validating"
	"k8s.io/apiserver/pkg/authentication/user"
	"k8s.io/apiserver/pkg/authorization/authorizer"
	"k8s.io/apiserver/pkg/util/compatibility"
	"k8s.io/apiserver/pkg/util/feature"
	"k8s.io/client-go/discovery"
	dynamicfake "k8s.io/client-go/dynamic/fake"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/kubernetes/fake"
	"k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/openapi"
	"k8s.io/client-go/openapi/openapitest"
	sigsyaml "sigs.k8s.io/yaml"
)

// A clientset whose discovery knows the schemas of Kubernetes.
type client struct{ kubernetes.Interface }

type schemas struct{ discovery.DiscoveryInterface }

func (c client) Discovery() discovery.DiscoveryInterface { return schemas{c.Interface.Discovery()} }
func (s schemas) OpenAPIV3() openapi.Client              { return openapitest.NewEmbeddedFileClient() }

type allowAll struct{}

func (allowAll) Authorize(context.Context, authorizer.Attributes) (authorizer.Decision, string, error) {
	return authorizer.DecisionAllow, "", nil
}

// An API server's admission chain, as far as it concerns these policies.
type server struct {
	mutating   *mutating.Plugin
	validating *validating.Plugin
}

func start(objects ...runtime.Object) server {
	plain := fake.NewSimpleClientset(objects...)
	factory := informers.NewSharedInformerFactory(plain, time.Minute)
	clients := client{plain}
	mapper := meta.NewDefaultRESTMapper(nil)
	mapper.Add(corev1.SchemeGroupVersion.WithKind("ConfigMap"), meta.RESTScopeNamespace)
	mapper.Add(corev1.SchemeGroupVersion.WithKind("Secret"), meta.RESTScopeNamespace)
	stop := make(chan struct{})
	initialize := initializer.New(clients, dynamicfake.NewSimpleDynamicClient(scheme.Scheme), factory, allowAll{},
		feature.DefaultFeatureGate, compatibility.DefaultBuildEffectiveVersion(), stop, mapper)
	mutator, err := mutating.NewPlugin(nil)
	check(err)
	validator, err := validating.NewPlugin(nil)
	check(err)
	for _, plugin := range []admission.InitializationValidator{mutator, validator} {
		initialize.Initialize(plugin.(admission.Interface))
	}
	check(mutator.ValidateInitialization())
	check(validator.ValidateInitialization())
	factory.Start(stop)
	factory.WaitForCacheSync(stop)
	// The plug-ins report ready when their policies are compiled; schemas come a moment later.
	for !mutator.WaitForReady() || !validator.WaitForReady() {
		time.Sleep(50 * time.Millisecond)
	}
	time.Sleep(2 * time.Second)
	return server{mutator, validator}
}

// The pod as it is admitted, or the reason why it is not.
func (s server) request(pod, old *corev1.Pod, operation admission.Operation, subresource string) (*corev1.Pod, error) {
	pod = pod.DeepCopy()
	var before runtime.Object
	if old != nil {
		before = old
	}
	attributes := admission.NewAttributesRecord(pod, before, corev1.SchemeGroupVersion.WithKind("Pod"), pod.Namespace, pod.Name,
		corev1.SchemeGroupVersion.WithResource("pods"), subresource, operation, &metav1.CreateOptions{}, false, &user.DefaultInfo{})
	interfaces := admission.NewObjectInterfacesFromScheme(scheme.Scheme)
	if err := s.mutating.Admit(context.Background(), attributes, interfaces); err != nil {
		return nil, err
	}
	if attributes.GetReinvocationContext().ShouldReinvoke() {
		attributes.GetReinvocationContext().SetIsReinvoke()
		if err := s.mutating.Admit(context.Background(), attributes, interfaces); err != nil {
			return nil, err
		}
	}
	return pod, s.validating.Validate(context.Background(), attributes, interfaces)
}

func (s server) create(pod *corev1.Pod) (*corev1.Pod, error) {
	return s.request(pod, nil, admission.Create, "")
}

func check(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// The objects of the files, without those of kinds to leave out.
func load(without ...string) []runtime.Object {
	files, err := filepath.Glob(filepath.Join(os.Args[1], "*.yaml"))
	check(err)
	var objects []runtime.Object
	for _, file := range files {
		text, err := os.ReadFile(file)
		check(err)
		for _, document := range strings.Split(string(text), "\n---\n") {
			json, err := yaml.ToJSON([]byte(document))
			check(err)
			object, kind, err := scheme.Codecs.UniversalDeserializer().Decode(json, nil, nil)
			check(err)
			skip := false
			for _, name := range without {
				skip = skip || kind.Kind == name
			}
			if skip {
				continue
			}
			// The API server's defaulting would write this.
			for _, constraints := range matchConstraints(object) {
				setDefaults(constraints)
			}
			objects = append(objects, object)
		}
	}
	return objects
}

const podText = `
apiVersion: v1
kind: Pod
metadata:
  name: p
  namespace: default
  labels: {vpn-exec.tunnel: wg}
spec:
  containers:
  - {name: app, image: app}
`

func podOf(text string) *corev1.Pod {
	var pod corev1.Pod
	check(sigsyaml.UnmarshalStrict([]byte(text), &pod))
	return &pod
}

func podWith(change func(*corev1.Pod)) *corev1.Pod {
	pod := podOf(podText)
	change(pod)
	return pod
}

func drops(container corev1.Container) string {
	if container.SecurityContext == nil || container.SecurityContext.Capabilities == nil {
		return ""
	}
	return fmt.Sprint(container.SecurityContext.Capabilities.Drop)
}

var failed bool

func report(name string, ok bool, detail any) {
	word := "ok    "
	if !ok {
		word, failed = "FAILED", true
	}
	fmt.Println(word, name)
	if !ok {
		fmt.Printf("       %v\n", detail)
	}
}

func refused(name string, err error, reason string) {
	report(name, err != nil && strings.Contains(err.Error(), reason), fmt.Sprintf("%v, and not: %s", err, reason))
}

// Sidecars that could run another program, or have more privileges than `attach` needs.
var sidecarsThatDoMore = map[string]func(*corev1.Container){
	"another image":        func(c *corev1.Container) { c.Image = "other" },
	"a command":            func(c *corev1.Container) { c.Command = []string{"/vpn-exec"} },
	"no arguments":         func(c *corev1.Container) { c.Args = nil },
	"another command line": func(c *corev1.Container) { c.Args[0] = "up" },
	"a hook": func(c *corev1.Container) {
		c.Lifecycle = &corev1.Lifecycle{PostStart: &corev1.LifecycleHandler{Exec: &corev1.ExecAction{Command: []string{"/etc/wireguard/x"}}}}
	},
	"another startup probe":  func(c *corev1.Container) { c.StartupProbe.Exec.Command[0] = "/etc/wireguard/x" },
	"another liveness probe": func(c *corev1.Container) { c.LivenessProbe.Exec.Command[0] = "/etc/wireguard/x" },
	"another readiness probe": func(c *corev1.Container) {
		c.ReadinessProbe = &corev1.Probe{ProbeHandler: corev1.ProbeHandler{Exec: &corev1.ExecAction{Command: []string{"/etc/wireguard/x"}}}}
	},
	"a mount over its program": func(c *corev1.Container) {
		c.VolumeMounts = append(c.VolumeMounts, corev1.VolumeMount{Name: "vpn-exec-wireguard", MountPath: "/vpn-exec", SubPath: "x"})
	},
	"such a mount by a detour": func(c *corev1.Container) {
		c.VolumeMounts = append(c.VolumeMounts, corev1.VolumeMount{Name: "vpn-exec-wireguard", MountPath: "/var/run/secrets/../../../vpn-exec", SubPath: "x"})
	},
	"a block device": func(c *corev1.Container) {
		c.VolumeDevices = []corev1.VolumeDevice{{Name: "v", DevicePath: "/dev/v"}}
	},
	"all privileges": func(c *corev1.Container) { c.SecurityContext.Privileged = new(bool); *c.SecurityContext.Privileged = true },
	"SYS_ADMIN": func(c *corev1.Container) {
		c.SecurityContext.Capabilities.Add = append(c.SecurityContext.Capabilities.Add, "SYS_ADMIN")
	},
	"no seccomp": func(c *corev1.Container) { c.SecurityContext.SeccompProfile.Type = "Unconfined" },
	"no AppArmor": func(c *corev1.Container) {
		c.SecurityContext.AppArmorProfile = &corev1.AppArmorProfile{Type: "Unconfined"}
	},
	"all of /proc": func(c *corev1.Container) {
		unmasked := corev1.UnmaskedProcMount
		c.SecurityContext.ProcMount = &unmasked
	},
}

func main() {
	secret := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: "wg", Namespace: "default"}, Data: map[string][]byte{"wg0.conf": nil}}
	wrongKey := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: "wg", Namespace: "wrong"}, Data: map[string][]byte{"other": nil}}
	namespaces := []runtime.Object{secret, wrongKey}
	for _, name := range []string{"default", "wrong", "empty"} {
		namespaces = append(namespaces, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name}})
	}
	all := start(append(load(), namespaces...)...)

	pod, err := all.create(podOf(podText))
	report("a minimal pod is admitted", err == nil, err)
	if err != nil {
		os.Exit(1)
	}
	sidecar := pod.Spec.InitContainers[0]
	context := sidecar.SecurityContext
	want := "attach /etc/wireguard/wg0.conf --backend=userspace --local=10.42.0.0/16 --local=10.43.0.0/16 " +
		"--dns-for=cluster.local=10.43.0.10"
	report("its sidecar has the settings' arguments", strings.Join(sidecar.Args, " ") == want, sidecar.Args)
	report("its sidecar has the settings' image", sidecar.Image == "localhost/vpn-exec:0.1.0", sidecar.Image)
	report("its sidecar restarts always", sidecar.RestartPolicy != nil && *sidecar.RestartPolicy == "Always", sidecar)
	report("its sidecar has NET_ADMIN alone", drops(sidecar) == "[ALL]" && fmt.Sprint(context.Capabilities.Add) == "[NET_ADMIN]" &&
		!*context.AllowPrivilegeEscalation && *context.ReadOnlyRootFilesystem && context.SeccompProfile.Type == "RuntimeDefault", context)
	report("its sidecar has probes", sidecar.StartupProbe.Exec.Command[2] == "--check" && sidecar.LivenessProbe != nil, sidecar)
	volumes := pod.Spec.Volumes
	report("its Secret is required", len(volumes) == 2 && volumes[0].Secret.SecretName == "wg" && !*volumes[0].Secret.Optional &&
		*volumes[0].Secret.DefaultMode == 0o400, volumes)
	report("its TUN device is a device", *volumes[1].HostPath.Type == corev1.HostPathCharDev, volumes)
	report("it asks the tunnel's resolver", pod.Spec.DNSPolicy == "None" && pod.Spec.DNSConfig.Nameservers[0] == "127.0.0.1",
		pod.Spec.DNSConfig)
	report("its container drops NET_RAW", drops(pod.Spec.Containers[0]) == "[NET_RAW]", pod.Spec.Containers[0])
	again, err := all.create(pod)
	report("a second pass changes nothing", err == nil && equality.Semantic.DeepEqual(pod, again), again)

	full := podOf(`
apiVersion: v1
kind: Pod
metadata:
  name: p
  namespace: default
  labels: {vpn-exec.tunnel: wg}
  annotations: {vpn-exec.open: "51413,6881/udp"}
spec:
  dnsPolicy: ClusterFirst
  dnsConfig: {searches: [example.org], nameservers: [192.0.2.53]}
  securityContext: {fsGroup: 7, sysctls: [{name: net.ipv4.tcp_syncookies, value: "1"}]}
  initContainers:
  - {name: first, image: app}
  - {name: second, image: app, securityContext: {capabilities: {drop: [CHOWN]}}}
  containers:
  - {name: none, image: app, securityContext: {}}
  - {name: add, image: app, securityContext: {capabilities: {add: [CHOWN]}}}
  - {name: drop, image: app, securityContext: {runAsUser: 5, capabilities: {drop: [CHOWN, KILL]}}}
  - {name: all, image: app, securityContext: {capabilities: {drop: [ALL]}}}
  - {name: raw, image: app, securityContext: {capabilities: {drop: [NET_RAW]}}}
  volumes:
  - {name: data, emptyDir: {}}
`)
	pod, err = all.create(full)
	report("a pod with everything is admitted", err == nil, err)
	var names, dropped []string
	for _, container := range append(append([]corev1.Container{}, pod.Spec.InitContainers...), pod.Spec.Containers...) {
		names, dropped = append(names, container.Name), append(dropped, drops(container))
	}
	report("the sidecar is the first", strings.Join(names, " ") == "vpn-exec first second none add drop all raw", names)
	report("each container drops NET_RAW once", strings.Join(dropped, " ") ==
		"[ALL] [NET_RAW] [CHOWN NET_RAW] [NET_RAW] [NET_RAW] [CHOWN KILL NET_RAW] [ALL] [NET_RAW]", dropped)
	report("the rest of it stays", *pod.Spec.SecurityContext.FSGroup == 7 && len(pod.Spec.SecurityContext.Sysctls) == 1 &&
		len(pod.Spec.Volumes) == 3 && *pod.Spec.Containers[2].SecurityContext.RunAsUser == 5, pod.Spec)
	report("its own resolvers are replaced", len(pod.Spec.DNSConfig.Searches) == 0 && pod.Spec.DNSConfig.Nameservers[0] == "127.0.0.1",
		pod.Spec.DNSConfig)
	report("its ports are opened", strings.HasSuffix(strings.Join(pod.Spec.InitContainers[0].Args, " "), " --open=51413 --open=6881/udp"),
		pod.Spec.InitContainers[0].Args)
	again, err = all.create(pod)
	report("a second pass changes nothing there either", err == nil && equality.Semantic.DeepEqual(pod, again), again)

	late := pod.DeepCopy()
	late.Spec.InitContainers[0], late.Spec.InitContainers[1] = late.Spec.InitContainers[1], late.Spec.InitContainers[0]
	_, err = all.create(late)
	refused("a container before the sidecar is refused", err, "does not begin with the sidecar")

	plain := podWith(func(pod *corev1.Pod) { pod.Labels = nil })
	pod, err = all.create(plain)
	report("a pod without the label stays as it is", err == nil && equality.Semantic.DeepEqual(pod, plain), pod)

	_, err = all.create(podWith(func(pod *corev1.Pod) { pod.Spec.HostNetwork = true }))
	refused("hostNetwork is refused", err, "hostNetwork")
	yes := true
	_, err = all.create(podWith(func(pod *corev1.Pod) {
		pod.Spec.Containers[0].SecurityContext = &corev1.SecurityContext{Privileged: &yes}
	}))
	refused("a privileged container is refused", err, "privileged")
	for _, name := range []corev1.Capability{"NET_ADMIN", "CAP_NET_RAW", "ALL"} {
		_, err = all.create(podWith(func(pod *corev1.Pod) {
			pod.Spec.Containers[0].SecurityContext = &corev1.SecurityContext{Capabilities: &corev1.Capabilities{Add: []corev1.Capability{name}}}
		}))
		refused(fmt.Sprintf("a container with %s is refused", name), err, "could get past")
	}
	_, err = all.create(podWith(func(pod *corev1.Pod) { pod.Labels["vpn-exec.tunnel"] = "Not_A_Secret" }))
	refused("an invalid name is refused", err, "not the name of a Secret")
	_, err = all.create(podWith(func(pod *corev1.Pod) {
		pod.Spec.InitContainers = []corev1.Container{{Name: "vpn-exec", Image: "app"}}
	}))
	refused("a container that only has the sidecar's name is refused", err, "does not begin with the sidecar")
	_, err = all.create(podWith(func(pod *corev1.Pod) { pod.Namespace = "empty" }))
	refused("a missing Secret is refused", err, "no params found")
	_, err = all.create(podWith(func(pod *corev1.Pod) { pod.Namespace = "wrong" }))
	refused("a Secret without wg0.conf is refused", err, "has no key wg0.conf")

	admitted, err := all.create(podOf(podText))
	check(err)
	// The pod's author brings the sidecar.
	own, err := all.create(admitted)
	report("a sidecar of one's own that is the policy's is admitted", err == nil, err)
	for name, change := range sidecarsThatDoMore {
		pod := own.DeepCopy()
		change(&pod.Spec.InitContainers[0])
		_, err = all.create(pod)
		refused("refused is a sidecar of one's own with "+name, err, "the sidecar vpn-exec has another image")
	}
	for _, argument := range []string{"--local=0.0.0.0/1", "--dns-for=example=192.0.2.53", "--closed", "/tmp/wg0.conf"} {
		pod := own.DeepCopy()
		pod.Spec.InitContainers[0].Args = append(pod.Spec.InitContainers[0].Args, argument)
		_, err = all.create(pod)
		refused("refused is a sidecar of one's own with the argument "+argument, err, "arguments that are not")
	}
	changed := admitted.DeepCopy()
	changed.Spec.InitContainers[0].Image = "other"
	_, err = all.request(changed, admitted, admission.Update, "")
	refused("another image for a running sidecar is refused", err, "the sidecar vpn-exec has another image")
	before := admitted.DeepCopy()
	before.Spec.InitContainers[0].Image = "localhost/vpn-exec:0.0.9"
	changed = before.DeepCopy()
	changed.Labels["more"] = "yes"
	_, err = all.request(changed, before, admission.Update, "")
	report("a pod with the image of earlier settings can be changed", err == nil, err)
	_, err = all.request(podWith(func(pod *corev1.Pod) { pod.Labels["vpn-exec.tunnel"] = "other" }), admitted, admission.Update, "")
	refused("another tunnel for a running pod is refused", err, "cannot be changed")
	_, err = all.request(podWith(func(pod *corev1.Pod) { pod.Labels = nil }), admitted, admission.Update, "")
	refused("taking the label away is refused", err, "cannot be changed")
	_, err = all.request(podOf(podText), podWith(func(pod *corev1.Pod) { pod.Labels = nil }), admission.Update, "")
	refused("a label for a running pod is refused", err, "cannot be changed")
	changed = admitted.DeepCopy()
	changed.Finalizers = nil
	_, err = all.request(changed, admitted, admission.Update, "")
	report("another update is admitted", err == nil, err)
	debug := admitted.DeepCopy()
	debug.Spec.EphemeralContainers = []corev1.EphemeralContainer{{EphemeralContainerCommon: corev1.EphemeralContainerCommon{Name: "debug"}}}
	_, err = all.request(debug, admitted, admission.Update, "ephemeralcontainers")
	refused("an ephemeral container with NET_RAW is refused", err, "ephemeral container")
	debug.Spec.EphemeralContainers[0].SecurityContext = &corev1.SecurityContext{Capabilities: &corev1.Capabilities{Drop: []corev1.Capability{"ALL"}}}
	_, err = all.request(debug, admitted, admission.Update, "ephemeralcontainers")
	report("an ephemeral container without it is admitted", err == nil, err)

	inNamespace := func(change func(*corev1.Pod)) *corev1.Pod {
		return podWith(func(pod *corev1.Pod) {
			pod.Namespace, pod.Labels = "downloads", nil
			change(pod)
		})
	}
	_, err = all.create(inNamespace(func(pod *corev1.Pod) {}))
	report("the namespace admits an ordinary pod", err == nil, err)
	device := corev1.HostPathCharDev
	for reason, change := range map[string]func(*corev1.Pod){
		"host namespaces": func(pod *corev1.Pod) { pod.Spec.HostPID = true },
		"hostPath": func(pod *corev1.Pod) {
			pod.Spec.Volumes = []corev1.Volume{{Name: "v", VolumeSource: corev1.VolumeSource{HostPath: &corev1.HostPathVolumeSource{Path: "/dev/sda", Type: &device}}}}
		},
		"adds a capability": func(pod *corev1.Pod) {
			pod.Spec.Containers[0].SecurityContext = &corev1.SecurityContext{Capabilities: &corev1.Capabilities{Add: []corev1.Capability{"NET_ADMIN"}}}
		},
		"a container is privileged": func(pod *corev1.Pod) {
			pod.Spec.InitContainers = []corev1.Container{{Name: "vpn-exec", Image: "other", SecurityContext: &corev1.SecurityContext{Privileged: &yes}}}
		},
		"the pod is unconfined": func(pod *corev1.Pod) {
			pod.Spec.SecurityContext = &corev1.PodSecurityContext{SeccompProfile: &corev1.SeccompProfile{Type: "Unconfined"}}
		},
		"only the sidecar": func(pod *corev1.Pod) {
			pod.Spec.Volumes = []corev1.Volume{{Name: "v", VolumeSource: corev1.VolumeSource{HostPath: &corev1.HostPathVolumeSource{Path: "/dev/net/tun", Type: &device}}}}
			pod.Spec.Containers[0].VolumeMounts = []corev1.VolumeMount{{Name: "v", MountPath: "/dev/net/tun"}}
		},
		"host ports": func(pod *corev1.Pod) {
			pod.Spec.Containers[0].Ports = []corev1.ContainerPort{{ContainerPort: 80, HostPort: 80}}
		},
	} {
		_, err = all.create(inNamespace(change))
		refused("the namespace refuses: "+reason, err, reason)
	}
	secretThere := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: "wg", Namespace: "downloads"}, Data: map[string][]byte{"wg0.conf": nil}}
	withSecret := start(append(load(), append(namespaces, secretThere)...)...)
	_, err = withSecret.create(podWith(func(pod *corev1.Pod) { pod.Namespace = "downloads" }))
	report("the namespace admits a pod with a tunnel", err == nil, err)
	ours := func(change func(*corev1.Container)) *corev1.Pod {
		return inNamespace(func(pod *corev1.Pod) {
			pod.Spec.InitContainers, pod.Spec.Volumes = own.DeepCopy().Spec.InitContainers, own.DeepCopy().Spec.Volumes
			change(&pod.Spec.InitContainers[0])
		})
	}
	there, err := all.create(ours(func(*corev1.Container) {}))
	report("the namespace admits a sidecar of one's own", err == nil, err)
	_, err = all.create(ours(func(sidecar *corev1.Container) { sidecar.Args = append(sidecar.Args, "--local=192.168.1.0/24") }))
	report("the namespace admits one with other arguments", err == nil, err)
	for name, change := range sidecarsThatDoMore {
		_, err = all.create(ours(change))
		refused("the namespace refuses a sidecar with "+name, err, "adds a capability that is forbidden here")
	}
	changed = there.DeepCopy()
	changed.Spec.InitContainers[0].Image = "other"
	_, err = all.request(changed, there, admission.Update, "")
	refused("the namespace refuses another image for a running sidecar", err, "adds a capability that is forbidden here")
	before = there.DeepCopy()
	before.Spec.InitContainers[0].Image = "localhost/vpn-exec:0.0.9"
	_, err = all.request(before.DeepCopy(), before, admission.Update, "")
	report("a pod there with the image of earlier settings can be changed", err == nil, err)

	unbound := start(append(load("MutatingAdmissionPolicyBinding"), namespaces...)...)
	_, err = unbound.create(podOf(podText))
	refused("without the mutating policy's binding the pod is refused", err, "does not begin with the sidecar")
	noSettings := start(append(load("ConfigMap"), namespaces...)...)
	_, err = noSettings.create(podOf(podText))
	refused("without the settings the pod is refused", err, "no params found")
	if failed {
		os.Exit(1)
	}
}
